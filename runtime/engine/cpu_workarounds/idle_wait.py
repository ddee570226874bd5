"""A correction to vLLM 0.32 on CPUs, carried into all of its processes by its plugin entry point (pyproject.toml).

Who waits sleeps. vLLM's processes talk through shared memory, and spin for a second after each message before they wait
in earnest: the core while a worker computes, the worker while nothing is asked. On machines with two cores that is a
quarter of them, taken from whoever has work.

Who sleeps looks again soon. A wait is ended by a notice beside the shared memory, and vLLM loses notices that follow
one another closely; it then looks again after five seconds, in which nobody gets a token.

Refuses to touch a vLLM that this project did not start. Remove it when the pinned version waits by itself.
"""

from __future__ import annotations

import os
from functools import wraps

MARK = "RATCHET_ENGINE"
"""Set in the environment of the engine that this project starts on CPUs."""
LONGEST_SLEEP_MS = 5


def sleep_while_waiting() -> None:
    """Have this process's waits begin at once and end soon."""
    if MARK not in os.environ:
        return
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = LONGEST_SLEEP_MS
    if not hasattr(shm_broadcast.SpinCondition.wait, "__wrapped__"):
        shm_broadcast.SpinCondition.wait = _without_spin(shm_broadcast.SpinCondition.wait)


def _without_spin(wait):
    @wraps(wait)
    def wait_at_once(self, timeout_ms=None):
        self.busy_loop_s = 0.0
        wait(self, timeout_ms)

    return wait_at_once
