"""The parts that all benchmarks share: open-loop arrivals, percentiles, one table, one JSON file.

Flow: `run_open_loop` (or `run_alone`) -> `Load` -> `Spread` -> `print_table`, `write_json`.
Invariant: a latency begins when the request was due, not when it was sent, so that a side that stalls is charged for
the requests that queued meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import platform
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MAX_OPEN = 1_000
"""Most requests in flight; one that is due beyond that is dropped, and counted as an error."""
OVERLOADED = "Overloaded"

Act = Callable[[int], Awaitable[Any]]
"""One request, by its number; its exceptions are counted by class."""


@dataclass(frozen=True)
class Spread:
    """The distribution of durations, in seconds; all NaN where there are none."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    worst: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        ranked = sorted(seconds)
        if not ranked:
            return cls(0, *[math.nan] * 5)
        shares = (percentile(ranked, share) for share in (0.5, 0.9, 0.99))
        return cls(len(ranked), sum(ranked) / len(ranked), *shares, ranked[-1])

    def in_millis(self) -> dict[str, float]:
        """Return it in milliseconds for a table or a file: `p50_ms` and so on."""
        return {f"{name}_ms": round(getattr(self, name) * 1e3, 3) for name in ("mean", "p50", "p90", "p99", "worst")}


def percentile(ranked: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile of sorted values: a measured value, not an interpolated one."""
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


@dataclass
class Load:
    """The result of one run."""

    due_per_second: float
    """The rate at which requests were due; 0 where one followed the other."""
    spans: dict[int, tuple[float, float]] = field(default_factory=dict)
    """When each request that succeeded was due and when it was done, by its number, on the monotonic clock."""
    errors: Counter[str] = field(default_factory=Counter)
    wall_seconds: float = 0.0

    @property
    def latencies(self) -> list[float]:
        return [done_at - due_at for due_at, done_at in self.spans.values()]

    @property
    def spread(self) -> Spread:
        return Spread.of(self.latencies)

    @property
    def done_per_second(self) -> float:
        return len(self.spans) / self.wall_seconds if self.wall_seconds else 0.0

    def keeps(self, p99_seconds: float, *, share_of_rate: float = 0.95) -> bool:
        """Return whether the side kept up: no error, this p99, and as many requests done as were due."""
        is_on_time = self.spread.p99 <= p99_seconds
        return not self.errors and is_on_time and self.done_per_second >= share_of_rate * self.due_per_second

    async def time(self, act: Act, number: int, due_at: float) -> None:
        """Run one request and record its span, which began when it was due."""
        try:
            await act(number)
        except Exception as error:
            self.errors[type(error).__name__] += 1
        else:
            self.spans[number] = (due_at, time.monotonic())


async def run_open_loop(
    act: Act, *, per_second: float, duration_seconds: float, seed: int = 0, max_open: int = MAX_OPEN
) -> Load:
    """Start requests when they are due, even if earlier ones are open; return once all have ended.

    Arrivals are a Poisson process, as of many independent clients, and the same for each run with one seed.
    """
    dues = list(_arrivals(per_second, duration_seconds, seed))
    load, open_tasks = Load(len(dues) / duration_seconds), set[asyncio.Task[None]]()
    all_begun = asyncio.Event()
    loop = asyncio.get_running_loop()
    started_at = time.monotonic() + 0.05

    def begin(number: int) -> None:
        if len(open_tasks) >= max_open:
            load.errors[OVERLOADED] += 1
        else:
            task = loop.create_task(load.time(act, number, started_at + dues[number]))
            open_tasks.add(task)
            task.add_done_callback(open_tasks.discard)
        if number == len(dues) - 1:
            all_begun.set()

    def tick() -> None:
        # A thread, because an event loop's timers have a resolution of one millisecond.
        for number, due in enumerate(dues):
            time.sleep(max(0.0, started_at + due - time.monotonic()))
            loop.call_soon_threadsafe(begin, number)

    threading.Thread(target=tick, name="arrivals", daemon=True).start()
    await all_begun.wait()
    while open_tasks:
        await asyncio.wait(open_tasks)
    load.wall_seconds = max(time.monotonic() - started_at, duration_seconds)
    return load


async def run_alone(act: Act, *, num_requests: int) -> Load:
    """Run one request after the other, never two at once."""
    load = Load(0.0)
    started_at = time.monotonic()
    for number in range(num_requests):
        await load.time(act, number, time.monotonic())
    load.wall_seconds = time.monotonic() - started_at
    return load


def _arrivals(per_second: float, duration_seconds: float, seed: int) -> Iterator[float]:
    """Yield the times at which requests are due, in seconds since the start: at least one."""
    gaps, due = random.Random(seed), 0.0
    while due < duration_seconds:
        yield due
        due += gaps.expovariate(per_second)


def make_parser(doc: str) -> argparse.ArgumentParser:
    """Return a benchmark's command line, with the options that all of them have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write everything")
    return parser


def machine() -> dict[str, Any]:
    """Return the machine and date of a measurement, without which a figure means nothing."""
    return {
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def print_table(title: str, rows: Sequence[dict[str, Any]], *, notes: Sequence[str] = ()) -> None:
    """Print rows under the names of their values, the machine above them and notes below; a key may be missing."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = machine()
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(f"{found['cpu']}, {found['num_cores']} cores, Python {found['python']}, {found['date']}")
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in names:
        is_number = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(name.replace("_", " "), justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*(_show(row.get(name)) for name in names))
    console.print(table)
    for note in notes:
        console.print(note)


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}" if abs(value) < 1 else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def write_json(
    path: Path | None, benchmark: str, rows: Sequence[Any], *, conditions: dict[str, Any], **more: Any
) -> None:
    """Write the results, with the machine and the conditions, if a file was asked for."""
    if path is None:
        return
    plain = [row if isinstance(row, dict) else asdict(row) for row in rows]
    found = {"benchmark": benchmark, "machine": machine(), "conditions": conditions, "rows": plain, **more}
    path.write_text(json.dumps(found, indent=2) + "\n")
