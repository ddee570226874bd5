"""How much processor time the engine's processes used and waited for, read from Linux's /proc.

An engine that other work keeps from the processor is slow: its threads are ready to run and wait in the scheduler's
queue. A stuck engine does not wait there: it sleeps, is stopped, or runs in circles. Without Linux's figures nothing is
known, and no process counts as held up.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")
NANOSECONDS = 1e9
HELD_UP_SHARE = 0.2
"""A thread is held up that spends this share of the time it is ready to run waiting for the processor ..."""
BUSY_SHARE = 0.1
"""... and is ready to run for this share of the time: idle threads that look around a few hundred times a second wait
too, but not for long."""
STOPPED, DISK = "Tt", "D"


@dataclass(frozen=True)
class ProcessActivity:
    """One process: the state of its main thread, and of each thread the seconds it ran and waited to run."""

    state: str
    threads: dict[int, tuple[float, float]] = field(default_factory=dict)


def read_activity(leader: int) -> dict[int, ProcessActivity]:
    """Return what the processes of a session have done so far, by process id; `leader` started the session."""
    found = {}
    for name in os.listdir(PROC):
        if name.isdigit() and (fields := _read_stat(name)) is not None and int(fields[3]) == leader:
            found[int(name)] = ProcessActivity(fields[0], _read_threads(name))
    return found


def is_held_up(
    before: dict[int, ProcessActivity], after: dict[int, ProcessActivity], seconds: float, *, without: int | None = None
) -> bool:
    """Return whether other work kept a process from the processor or the disk during these seconds.

    `without` is a process that is known to have answered, so that what the others wait for is not its turn. A process
    that is stopped outweighs all: as long as it is, no other can make progress for it.
    """
    both = before.keys() & after.keys()
    if any(_is_stopped(before[pid], after[pid]) for pid in both):
        return False
    others = both - {without} or both
    return any(after[pid].state == DISK or _waits(before[pid], after[pid], seconds) for pid in others)


def _is_stopped(before: ProcessActivity, after: ProcessActivity) -> bool:
    """Return whether it was stopped at both looks and nothing of it ran between them, as under a throttle it would."""
    return before.state in STOPPED and after.state in STOPPED and before.threads == after.threads


def _waits(before: ProcessActivity, after: ProcessActivity, seconds: float) -> bool:
    for thread in before.threads.keys() & after.threads.keys():
        ran, waited = (now - then for then, now in zip(before.threads[thread], after.threads[thread], strict=True))
        if ran + waited >= BUSY_SHARE * seconds and waited >= HELD_UP_SHARE * (ran + waited):
            return True
    return False


def _read_stat(name: str) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on; None for a process that has ended."""
    try:
        return (PROC / name / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _read_threads(name: str) -> dict[int, tuple[float, float]]:
    threads = {}
    try:
        for thread in os.listdir(PROC / name / "task"):
            ran, waited, _ = (PROC / name / "task" / thread / "schedstat").read_text().split()
            threads[int(thread)] = (int(ran) / NANOSECONDS, int(waited) / NANOSECONDS)
    except OSError:
        pass  # it ends meanwhile, or this kernel keeps no such figures
    return threads
