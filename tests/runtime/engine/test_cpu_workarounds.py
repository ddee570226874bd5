"""The corrections to vLLM's CPU build, against its own operations; in a process of their own, for vLLM is heavy."""

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
theirs = {name: getattr(lora_ops, name) for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")}
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
