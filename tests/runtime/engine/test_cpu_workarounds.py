"""The corrections to vLLM's CPU build, against its own operations; in a separate process, because vLLM is heavy."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

PRELUDE = """
import torch
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
theirs = {name: getattr(lora_ops, name) for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")}
their_linear, their_logits = PunicaWrapperCPU.add_lora_linear, PunicaWrapperCPU.add_lora_logits
from runtime.engine.cpu_workarounds import worker as ours
torch.manual_seed(0)
rows, width, rank, num_slots = 60, 48, 8, 4
inputs = torch.randn(rows, width, dtype=torch.bfloat16)
down = torch.randn(num_slots, 1, rank, width, dtype=torch.bfloat16)
up = torch.randn(num_slots, 1, 2 * width, rank, dtype=torch.bfloat16)
worn = torch.randint(0, num_slots, (rows,))
"""

SAME_NUMBERS = """
expected, found = torch.zeros(rows, rank), torch.ones(rows, rank)
theirs["bgmv_shrink"](inputs, down, expected, worn, 2.0)
ours.shrink(inputs, down, found, worn, 2.0)
assert torch.allclose(expected, found, atol=1e-3), "shrink"
for name, operation, extra in (
    ("bgmv_expand", ours.expand, ()),
    ("bgmv_expand_slice", ours.expand_slice, (3, 2 * width)),
):
    for add in (True, False):
        one = torch.randn(rows, 2 * width + 5, dtype=torch.bfloat16)
        other = one.clone()
        theirs[name](expected, up, one, worn, *extra, add)
        operation(expected, up, other, worn, *extra, add)
        first = extra[0] if extra else 0
        columns = slice(first, first + 2 * width)
        assert torch.equal(one[:, columns], other[:, columns]), (name, add)
"""

BARE_ROWS = """
worn[:10] = -1
small, wide = torch.ones(rows, rank), torch.randn(rows, 2 * width)
before = wide.clone()
ours.shrink(inputs, down, small, worn, 2.0)
ours.expand(small, up, wide, worn, True)
assert (small[:10] == 0).all() and torch.equal(before[:10], wide[:10]) and not torch.equal(before[10:], wide[10:])
"""


LAYER = """
class Mapping:
    is_prefill = False
class Wrapper(PunicaWrapperCPU):
    def _update_base_metadata(self, mapping, slots, max_loras, vocab_size):
        self._token_lora_indices = self._sampler_indices = torch.tensor(slots)
        self.indices_len = [len(slots)] * 4
def wrap(slots):
    wrapper = Wrapper.__new__(Wrapper)
    wrapper.is_prefill, wrapper.no_lora = False, False
    wrapper.update_metadata(Mapping, slots, num_slots, 0)
    return wrapper
widths = (24, 8, 40)
downs = tuple(torch.randn(num_slots, 1, rank, width, dtype=torch.bfloat16) for _ in widths)
ups = tuple(torch.randn(num_slots, 1, each, rank, dtype=torch.bfloat16) for each in widths)
def check(slots):
    rows = torch.randn(len(slots), width, dtype=torch.bfloat16)
    one = torch.randn(len(slots), sum(widths), dtype=torch.bfloat16)
    other = one.clone()
    their_linear(wrap(slots), one, rows, downs, ups, 1.0, widths)
    wrap(slots).add_lora_linear(other, rows, downs, ups, 1.0, widths)
    assert torch.allclose(one, other, atol=0.5, rtol=0.02), (slots, (one - other).abs().max())
    bare = [number for number, slot in enumerate(slots) if slot < 0]
    assert torch.equal(one[bare], other[bare])
    one = torch.randn(len(slots), widths[2], dtype=torch.bfloat16)
    other = one.clone()
    their_logits(wrap(slots), one, rows, downs[2], ups[2], 1.0)
    wrap(slots).add_lora_logits(other, rows, downs[2], ups[2], 1.0)
    assert torch.allclose(one, other, atol=0.5, rtol=0.02), (slots, (one - other).abs().max())
downs[1][1] = 0  # an adapter that leaves one layer of three alone
for down in downs:
    down[3, 0, 5:] = 0  # and one of a lower rank
    down[0] = 0  # and one that has none of these layers
for slots in ([2], [-1], [0] * 9, [0, 1, -1, 3, 1], [1] * 300, [3] * 40, [0, -1, 2, 3] * 100):
    check(slots)
class Manager(LoRAModelManager):
    def __init__(self):
        self._active_adapters, self.lora_index_to_id, self.modules = {7: None}, [], {}
# vLLM does this at every step with the adapters of the batch: the joined matrices stay
joined = dict(ours._joined)
assert joined and not Manager().activate_adapter(7) and ours._joined == joined
downs[0][2].zero_()  # another adapter comes into the slot
try:
    LoRAModelManager._deactivate_adapter(Manager(), 1)
except ValueError:
    pass
check([2])
"""


@pytest.mark.engine
def test_layers_of_few_and_many_rows_give_vllms_numbers_also_after_another_adapter_came_into_the_slot():
    run = subprocess.run([sys.executable, "-c", PRELUDE + LAYER], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.engine
def test_rows_by_adapter_give_vllms_numbers_and_bare_rows_stay_bare():
    command = [sys.executable, "-c", PRELUDE + SAME_NUMBERS + BARE_ROWS]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


def test_amx_is_asked_for_where_the_processor_has_it():
    """Without the permission vLLM's attention ends the worker with an illegal instruction (signal 4)."""
    code = """
import ctypes, torch
if torch.cpu._is_amx_tile_supported():
    import runtime.engine.cpu_workarounds.worker
    ARCH_PRCTL, ARCH_GET_XCOMP_PERM, TILE_DATA = 158, 0x1022, 1 << 18
    permitted = ctypes.c_uint64()
    assert ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_GET_XCOMP_PERM, ctypes.byref(permitted)) == 0
    assert permitted.value & TILE_DATA
    print("permitted")
else:
    print("no AMX")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if done.stdout.endswith("no AMX\n"):
        pytest.skip("this processor has no AMX")
