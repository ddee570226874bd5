"""A correction to vLLM 0.32 on CPUs, carried into all of its processes by its plugin entry point (pyproject.toml).

Who waits sleeps. vLLM's processes talk through shared memory, and spin for a second after each message before they wait
in earnest: the core while a worker computes, the worker while nothing is asked. On machines with two cores that is a
quarter of them, taken from whoever has work.

Refuses to touch a vLLM that this project did not start. Remove it when the pinned version waits by itself.
"""

from __future__ import annotations

import os
from functools import wraps

MARK = "RATCHET_ENGINE"
"""Set in the environment of the engine that this project starts on CPUs."""


def sleep_while_waiting() -> None:
    """Have this process's waits begin at once."""
    if MARK not in os.environ:
        return
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    if not hasattr(SpinCondition.wait, "__wrapped__"):
        SpinCondition.wait = _without_spin(SpinCondition.wait)


def _without_spin(wait):
    @wraps(wait)
    def wait_at_once(self, timeout_ms=None):
        self.busy_loop_s = 0.0
        wait(self, timeout_ms)

    return wait_at_once
