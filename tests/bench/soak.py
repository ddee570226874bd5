"""A soak test: the server's memory, open files and latency at a steady rate over minutes or an hour.

One server, one engine with a fixed delay, clients of many users; one answer in twenty is rated. The run is cut into
windows of equal length. The slope of the memory is fitted over the second half, because caches fill and indexes warm up
in the first. `--minutes 60` is the full run; `tests/faults/server/test_soak.py` asserts the limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from tests.bench.fixed_engine import FixedEngine
from tests.bench.measure import Load, make_parser, print_table, run_open_loop, write_json
from tests.bench.server import Client, OurServer, Process, cpu_seconds, dump, end_in_order

NUM_PERSONS = 50
RATED_ONE_IN = 20
NUM_WINDOWS = 20
DELAY_SECONDS = 0.02


@dataclass(frozen=True)
class Window:
    """One part of the run: its latencies, and the server's memory and open files at its end."""

    minute: float
    """End of the window, since the start of the run."""
    num_requests: int
    errors: int
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    """Processor time of the server per request."""
    rss_mb: float
    anonymous_mb: float
    """The part of `rss_mb` that is heap; the rest is mapped files, which the kernel can take back."""
    num_files: int
    num_threads: int


class Traffic:
    """Many users who chat, and rate some answers."""

    def __init__(self, url: str) -> None:
        self._chat = Client(url, "/v1/chat/completions", {"Authorization": "Bearer none"})
        self._feedback = Client(url, "/v1/feedback", {"Authorization": "Bearer none"})
        self._numbers = itertools.count()

    async def ask(self, _number: int) -> None:
        number = next(self._numbers)
        asked = f"Request {number}: when is invoice {number % 997} due, and was order {number % 89} shipped?"
        body = {"model": "agent", "messages": [{"role": "user", "content": asked}], "user": f"p{number % NUM_PERSONS}"}
        answer = json.loads(await self._chat.post(dump(body)))
        if number % RATED_ONE_IN == 0:
            await self._feedback.post(dump({"target": answer["id"], "value": True}))

    def close(self) -> None:
        self._chat.close()
        self._feedback.close()


def read_memory(pid: int) -> dict[str, float]:
    """Return the kernel's figures of a process's memory, in MB (10^6 bytes), by their names in /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return {name: int(fields[name][0]) * 1024 / 1e6 for name in ("VmRSS", "RssAnon")} | {
        "Threads": int(fields["Threads"][0])
    }


def slope(windows: Sequence[Window]) -> float:
    """Return how fast the memory grows, in MB a minute, by least squares."""
    minutes, sizes = [it.minute for it in windows], [it.rss_mb for it in windows]
    middle, mean = sum(minutes) / len(minutes), sum(sizes) / len(sizes)
    spread = sum((minute - middle) ** 2 for minute in minutes)
    return sum((minute - middle) * (size - mean) for minute, size in zip(minutes, sizes, strict=True)) / spread


async def run_window(process: Process, traffic: Traffic, per_second: float, seconds: float, began: float) -> Window:
    cpu_before = cpu_seconds(process.pid)
    load: Load = await run_open_loop(traffic.ask, per_second=per_second, duration_seconds=seconds, seed=int(began))
    memory, found = read_memory(process.pid), load.spread
    return Window(
        minute=round((time.monotonic() - began) / 60, 3),
        num_requests=len(load.spans),
        errors=load.errors.total(),
        p50_ms=round(found.p50 * 1e3, 2),
        p99_ms=round(found.p99 * 1e3, 2),
        cpu_ms=round((cpu_seconds(process.pid) - cpu_before) * 1e3 / max(1, len(load.spans)), 2),
        rss_mb=round(memory["VmRSS"], 2),
        anonymous_mb=round(memory["RssAnon"], 2),
        num_files=len(os.listdir(f"/proc/{process.pid}/fd")),
        num_threads=int(memory["Threads"]),
    )


async def soak(process: Process, *, per_second: float, seconds: float, num_windows: int = NUM_WINDOWS) -> list[Window]:
    """Load a running server for the given time; return its windows."""
    traffic, began = Traffic(process.url), time.monotonic()
    windows = []
    try:
        for _ in range(num_windows):
            windows.append(await run_window(process, traffic, per_second, seconds / num_windows, began))
            print(windows[-1], flush=True)
    finally:
        traffic.close()
    return windows


def summarise(windows: Sequence[Window]) -> dict[str, Any]:
    """Return the figures that have a limit: the memory's slope, open files, and p99 of the second half."""
    half, last = windows[len(windows) // 2 :], windows[-1]
    early = sorted(it.p99_ms for it in windows[: len(windows) // 2])
    late = sorted(it.p99_ms for it in half)
    return {
        "num_requests": sum(it.num_requests for it in windows),
        "errors": sum(it.errors for it in windows),
        "rss_mb_per_minute": round(slope(half), 3),
        "rss_mb_per_1000_requests": round(slope(half) / (last.num_requests / _minutes_of_one(windows)) * 1e3, 3),
        "files_grown": last.num_files - half[0].num_files,
        "median_p99_ms": (early[len(early) // 2], late[len(late) // 2]),
    }


def _minutes_of_one(windows: Sequence[Window]) -> float:
    return windows[-1].minute / len(windows)


@contextlib.contextmanager
def server(*arguments: str) -> Iterator[Process]:
    """Our server in front of an engine that answers after `DELAY_SECONDS`."""
    with (
        FixedEngine(delay_seconds=DELAY_SECONDS, num_tool_calls=0) as engine,
        OurServer("--engine.url", engine.url, *arguments) as process,
    ):
        yield process.settle()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--per-second", type=float, default=20.0)
    given = parser.parse_args()
    end_in_order()
    with server() as process, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        windows = runner.run(soak(process, per_second=given.per_second, seconds=given.minutes * 60))
    found = summarise(windows)
    rows = [vars(it) for it in windows]
    print_table(f"{given.minutes:g} minutes at {given.per_second:g} requests/s", rows, notes=[str(found)])
    conditions = {"minutes": given.minutes, "per_second": given.per_second, "delay_ms": DELAY_SECONDS * 1e3}
    write_json(given.json, "soak", rows, conditions=conditions, summary=found)


if __name__ == "__main__":
    main()
