"""Parsing of nvidia-smi's output."""

from __future__ import annotations

import pytest

from runtime.engine.gpus import find_engine_device, parse_gpus

SAID = """\
0, GPU-1b2c, 81559, 12034, NVIDIA H100 80GB HBM3
1, GPU-9f00, 24564, 24001, NVIDIA GeForce RTX 4090
2, GPU-77aa, [N/A], [N/A], NVIDIA GB10
"""


def test_gpus_are_read_with_their_memory_and_those_that_do_not_say_it_left_out():
    first, second = parse_gpus(SAID)
    assert (first.index, first.name) == ("0", "NVIDIA H100 80GB HBM3")
    assert first.total_bytes == 81559 * 2**20 and second.free_bytes == 24001 * 2**20
    assert parse_gpus("") == []


@pytest.mark.parametrize(
    ("visible", "device"),
    [(None, "0"), ("", "0"), ("1,0", "1"), ("GPU-9f00", "1"), ("GPU-9f", "1"), ("MIG-4711", "MIG-4711"), ("7", "7")],
)
def test_the_engine_takes_the_first_gpu_that_it_sees(visible: str | None, device: str):
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert find_engine_device(parse_gpus(SAID), environ) == device


def test_without_a_gpu_the_engine_has_none():
    assert find_engine_device([], {"CUDA_VISIBLE_DEVICES": "0"}) is None
