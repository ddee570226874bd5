"""Corrects how vLLM 0.32's processes wait on CPUs; vLLM loads it into all of them as a plugin (pyproject.toml).

1. vLLM's processes spin for a second after each message in shared memory before they block: the core while a worker
   computes, the worker while there is no request. With two cores that takes a quarter of the machine.
2. vLLM loses notifications that follow each other closely, and a blocked reader then checks again only after five
   seconds, in which no token is generated. Here it checks again after milliseconds.

Both are in vllm/distributed/device_communicators/shm_broadcast.py (`SpinCondition`). Delete this module, and its entry
point, when the pinned vLLM blocks at once and loses no notification. Invariant: a vLLM that this project did not start
is not changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

MARK = "RATCHET_ENGINE"
"""Set in the environment of the engine that this project starts on CPUs."""
LONGEST_SLEEP_MS = 5


def sleep_while_waiting() -> None:
    """Make waits in this process block at once and check again soon."""
    if MARK not in os.environ:
        return
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = LONGEST_SLEEP_MS
    if not hasattr(shm_broadcast.SpinCondition.wait, "__wrapped__"):
        shm_broadcast.SpinCondition.wait = _block_at_once(shm_broadcast.SpinCondition.wait)


def _block_at_once(wait: Callable[..., None]) -> Callable[..., None]:
    @wraps(wait)
    def wait_without_spin(self: SpinCondition, timeout_ms: float | None = None) -> None:
        # The attribute that vLLM 0.32 reads here; under another name this does nothing, without an error.
        self.busy_loop_s = 0.0
        wait(self, timeout_ms)

    return wait_without_spin
