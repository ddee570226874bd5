"""vLLM's processes wait as `runtime.engine.cpu_workarounds.idle_wait` says, in an engine of ours and nowhere else."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from runtime.engine.cpu_workarounds.idle_wait import LONGEST_SLEEP_MS, MARK

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

ASK = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.distributed.device_communicators import shm_broadcast
print(hasattr(shm_broadcast.SpinCondition.wait, "__wrapped__"), shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS)
"""


@pytest.mark.engine
@pytest.mark.parametrize("is_ours", [True, False])
def test_waits_are_changed_in_our_engine_and_in_no_other(is_ours):
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    if is_ours:
        environment[MARK] = "1"
    run = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    is_changed, longest_sleep_ms = run.stdout.split()[-2:]
    assert (is_changed == "True") is is_ours
    assert (int(longest_sleep_ms) == LONGEST_SLEEP_MS) is is_ours
