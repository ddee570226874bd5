"""Processor time that the engine's processes used and waited for, read from Linux's /proc.

An engine that other work keeps from the processor is slow: its threads are runnable and wait in the scheduler's queue.
A stuck engine does not wait there: it sleeps, is stopped, or loops. Hazard: on systems without Linux's figures no
process counts as held up.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")
NANOSECONDS = 1e9
HELD_UP_SHARE = 0.2
"""A thread is held up if it waits for the processor during this share of its runnable time ..."""
BUSY_SHARE = 0.1
"""... and is runnable during this share of the time: idle threads that poll a few hundred times a second wait too, but
briefly."""
STOPPED, DISK, RUNNABLE = "Tt", "D", "R"


@dataclass(frozen=True)
class ProcessActivity:
    """One process: the state of its main thread, and for each thread id the seconds it ran and waited to run."""

    state: str
    threads: dict[int, tuple[float, float]] = field(default_factory=dict)


def read_activity(leader: int) -> dict[int, ProcessActivity]:
    """Return the activity so far of all processes of a session, by process id; `leader` started the session."""
    activity = {}
    for name in os.listdir(PROC):
        # The session (field 6 of proc(5), `fields[3]` here), not the parent: it also holds for grandchildren whose
        # parent died.
        if name.isdigit() and (fields := _read_stat(name)) is not None and int(fields[3]) == leader:
            activity[int(name)] = ProcessActivity(fields[0], _read_threads(name))
    return activity


def is_held_up(
    before: dict[int, ProcessActivity], after: dict[int, ProcessActivity], seconds: float, *, without: int | None = None
) -> bool:
    """Return whether other work kept a process from the processor or the disk during these seconds.

    `without` is a process that is known to have answered, so it is not compared. One that did not answer is: behind it
    a sound engine sleeps, because nothing reaches it.
    """
    # A stopped process keeps the others from any progress, however long they wait.
    if is_stopped(before, after):
        return False
    both = before.keys() & after.keys()
    others = both - {without} or both
    return any(
        after[pid].state == DISK
        or _waits(before[pid], after[pid], seconds)
        or _never_ran(before[pid].threads.get(pid), after[pid].threads.get(pid), after[pid].state)
        for pid in others
    )


def is_newly_stopped(before: dict[int, ProcessActivity], after: dict[int, ProcessActivity]) -> bool:
    """Return whether a process is stopped now that was not: it may be throttled, so it has to be looked at again."""
    return any(
        process.state in STOPPED and pid in before and before[pid].state not in STOPPED
        for pid, process in after.items()
    )


def is_stopped(before: dict[int, ProcessActivity], after: dict[int, ProcessActivity]) -> bool:
    """Return whether a process was stopped both times and no thread of it ran between them; a throttled one does
    run."""
    return any(
        before[pid].state in STOPPED and after[pid].state in STOPPED and before[pid].threads == after[pid].threads
        for pid in before.keys() & after.keys()
    )


def _waits(before: ProcessActivity, after: ProcessActivity, seconds: float) -> bool:
    for thread in before.threads.keys() & after.threads.keys():
        ran, waited = (now - then for then, now in zip(before.threads[thread], after.threads[thread], strict=True))
        if ran + waited >= BUSY_SHARE * seconds and waited >= HELD_UP_SHARE * (ran + waited):
            return True
    return False


def _never_ran(before: tuple[float, float] | None, after: tuple[float, float] | None, state: str) -> bool:
    """Return whether a process's main thread still waits in the queue and did not run since.

    Linux adds the time in the queue only when a thread leaves it, so this long wait shows in no figure.
    """
    return state == RUNNABLE and before is not None and before == after


def _read_stat(name: str) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on; None for a process that has ended."""
    try:
        # From the last ")": the command's name in parentheses may itself hold spaces and parentheses.
        return (PROC / name / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _read_threads(name: str) -> dict[int, tuple[float, float]]:
    threads = {}
    try:
        for thread in os.listdir(PROC / name / "task"):
            # In nanoseconds: time on the processor, and time in its queue. The third figure counts time slices.
            ran, waited, _ = (PROC / name / "task" / thread / "schedstat").read_text().split()
            threads[int(thread)] = (int(ran) / NANOSECONDS, int(waited) / NANOSECONDS)
    except OSError:
        pass  # the process has ended, or this kernel has no such figures
    return threads
