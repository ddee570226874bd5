"""The durable log against the disk: steps of 4 KB, each acknowledged after its fsync, beside raw SQLite batch inserts.

    python -m tests.bench.durable_log [--producers 64] [--steps 12800] [--rounds 3] [--kills 5] [--on DIR] [--json FILE]

Ours is the full write path of an episode's step in memory: the guard on its trajectory and position, group commit, the
wake-up of its producer. Raw is the floor: the same rows as bound tuples into the same tables, by `executemany` alone.
Both sides alternate in one directory, which must be on the disk to be measured, not on a tmpfs.

Invariant: every counted row is on disk (WAL, synchronous=FULL) before it is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import uvloop

from memory.records.policies import Policies
from memory.records.trajectories import Trajectories
from memory.schema import Step, StepKind, Trajectory, new_id, now
from memory.storage.database import Database
from memory.storage.sqlite import WRITER
from tests.bench.measure import Load, Spread, make_parser, print_table, run_open_loop, write_json
from tests.bench.server import end_in_order

RAW_BATCHES = (1, 64, 512)
SHARES_OF_BEST = (0.25, 0.5, 0.75)
"""Open-loop rates, as shares of the closed-loop rate of the producers."""
TARGET_SHARE = 0.5
TARGET_P99_SECONDS = 0.015
LINE = "{trajectory_id} {position}\n"
TALK = "You are in a kitchen. " * 180  # 4 KB of a tool's result
CALL = {"id": "call-0", "type": "function", "function": {"name": "act", "arguments": '{"command": "open the fridge"}'}}
PROMPT_IDS, OUTPUT_IDS = list(range(850)), list(range(60))


def make_step(trajectory_id: str, position: int) -> Step:
    """Return a step of about 4 KB: alternately a model call, with its token ids, and a tool result."""
    place = {"trajectory_id": trajectory_id, "position": position, "created_at": now()}
    if position % 2:
        return Step(**place, kind=StepKind.TOOL, content=TALK, tool_calls=[], tool_name="act", tool_call_id="call-0")
    return Step(
        **place,
        kind=StepKind.MODEL,
        content="I look into the fridge, then.",
        tool_calls=[CALL],
        finish_reason="tool_calls",
        prompt_token_ids=PROMPT_IDS,
        output_token_ids=OUTPUT_IDS,
    )


def make_steps(opened: Sequence[Trajectory], num_each: int) -> list[list[Step]]:
    """Return the steps of each trajectory, frozen so that the garbage collector does not scan them."""
    steps = [[make_step(trajectory.id, position) for position in range(num_each)] for trajectory in opened]
    gc.collect()
    gc.freeze()
    return steps


class Log:
    """A database with one open trajectory for each producer."""

    def __init__(self, path: Path) -> None:
        self.database = Database(path)
        self.trajectories = Trajectories(self.database)
        self.opened: list[Trajectory] = []

    async def open(self, num_producers: int) -> list[Trajectory]:
        await Policies(self.database).register_base("pocket")
        self.opened = [
            await self.trajectories.open(Trajectory(id=new_id("trj"), episode_id="e", policy=0))
            for _ in range(num_producers)
        ]
        return self.opened

    async def append(self, producer: int, step: Step) -> None:
        await self.trajectories.append(step, trajectory=self.opened[producer])


async def append_as_fast_as_acknowledged(path: Path, num_producers: int, num_steps: int) -> Load:
    """Append closed-loop, each producer one step after the other; a latency is that of one acknowledgement."""
    log = Log(path)
    with closing(log.database):
        steps = make_steps(await log.open(num_producers), num_steps // num_producers)
        load = Load(0.0)

        async def produce(producer: int) -> None:
            for step in steps[producer]:
                began_at = time.monotonic()
                await log.append(producer, step)
                load.spans[len(load.spans)] = (began_at, time.monotonic())

        began_at = time.monotonic()
        await asyncio.gather(*(produce(producer) for producer in range(num_producers)))
        load.wall_seconds = time.monotonic() - began_at
        return load


async def append_by_the_clock(path: Path, num_producers: int, per_second: float, seconds: float) -> Load:
    """Append open-loop: steps start when they are due; within a trajectory one after the other."""
    log = Log(path)
    with closing(log.database):
        rest = make_steps(await log.open(num_producers), int(1.5 * per_second * seconds / num_producers) + 8)
        turns = [asyncio.Lock() for _ in range(num_producers)]

        async def append(number: int) -> None:
            producer = number % num_producers
            async with turns[producer]:
                await log.append(producer, rest[producer].pop(0))

        return await run_open_loop(append, per_second=per_second, duration_seconds=seconds, max_open=20_000)


def insert_raw(path: Path, rows: Sequence[tuple], batch_size: int) -> Load:
    """Insert the rows in batches into the same tables; a latency is that of one batch."""
    Database(path).close()  # creates the tables
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for pragma in WRITER:
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("PRAGMA foreign_keys=OFF")
        statement = f"INSERT INTO steps VALUES ({', '.join('?' * len(rows[0]))})"
        load = Load(0.0)
        began_at = time.monotonic()
        for start in range(0, len(rows), batch_size):
            batch_began_at = time.monotonic()
            batch = rows[start : start + batch_size]
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(statement, batch)
            connection.execute("COMMIT")
            span = (batch_began_at, time.monotonic())
            load.spans.update({start + place: span for place in range(len(batch))})
        load.wall_seconds = time.monotonic() - began_at
        return load


def bound_rows(path: Path) -> list[tuple]:
    """Return the rows of the steps in a database file."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT * FROM steps ORDER BY position, trajectory_id").fetchall()


def kill_in_the_middle(path: Path, num_producers: int, seconds: float) -> dict[str, int]:
    """Kill a child while it appends; compare its acknowledged steps with the rows in the file."""
    command = [sys.executable, "-m", "tests.bench.durable_log", "--append-forever", str(path)]
    with subprocess.Popen([*command, "--producers", str(num_producers)], stdout=subprocess.PIPE) as child:
        said = child.stdout.readline()
        os.set_blocking(child.stdout.fileno(), False)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            said += child.stdout.read() or b""
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        os.set_blocking(child.stdout.fileno(), True)
        said += child.stdout.read()
    lines = said.decode().splitlines(keepends=True)
    acknowledged = Counter(line for line in lines if line.endswith("\n"))
    with closing(sqlite3.connect(path)) as connection:
        is_sound = connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        found = Counter(
            LINE.format(trajectory_id=trajectory_id, position=position)
            for trajectory_id, position in connection.execute("SELECT trajectory_id, position FROM steps")
        )
    return {
        "acknowledged": acknowledged.total(),
        "rows": found.total(),
        "missing": (acknowledged - found).total(),
        "twice": found.total() - len(found),
        "in flight": (found - acknowledged).total(),
        "damaged": int(not is_sound),
    }


async def append_forever(path: Path, num_producers: int) -> None:
    """Run in the child: append and print each acknowledged step until killed."""
    log = Log(path)
    await log.open(num_producers)

    async def produce(producer: int) -> None:
        position = 0
        while True:
            step = make_step(log.opened[producer].id, position)
            await log.append(producer, step)
            told = LINE.format(trajectory_id=step.trajectory_id, position=position)
            os.write(sys.stdout.fileno(), told.encode())
            position += 1

    await asyncio.gather(*(produce(producer) for producer in range(num_producers)))


@contextmanager
def fresh_file(on: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".durable-log-", dir=on) as directory:
        yield Path(directory) / "ratchet.db"


def measure_throughput(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Alternate both sides; return a row for each side and batch size, medians of the rounds."""
    loads: dict[tuple[str, int], list[Load]] = {}
    crowds = (arguments.producers, 8 * arguments.producers)
    for _ in range(arguments.rounds):
        for num_producers in crowds:
            with fresh_file(arguments.on) as path:
                load = uvloop.run(append_as_fast_as_acknowledged(path, num_producers, arguments.steps))
                loads.setdefault(("ours", num_producers), []).append(load)
                rows = bound_rows(path)
        for batch_size in RAW_BATCHES:
            with fresh_file(arguments.on) as path:
                # Single-row inserts are slow: a tenth of the rows is enough.
                load = insert_raw(path, rows if batch_size > 1 else rows[: len(rows) // 10], batch_size)
                loads.setdefault(("raw", batch_size), []).append(load)
    return [
        {
            "side": side,
            "rows that wait together": num_rows,
            "rows/s": statistics.median(load.done_per_second for load in found),
            "p50 ms": statistics.median(load.spread.p50 for load in found) * 1e3,
            "p99 ms": statistics.median(load.spread.p99 for load in found) * 1e3,
        }
        for (side, num_rows), found in loads.items()
    ]


def add_shares(rows: list[dict[str, Any]]) -> None:
    """Add to each of our rows its share of the raw rate: at the same batch size, and at the best."""
    raw = {row["rows that wait together"]: row["rows/s"] for row in rows if row["side"] == "raw"}
    for row in rows:
        if row["side"] == "ours":
            row["of raw, same batch"] = row["rows/s"] / raw.get(row["rows that wait together"], max(raw.values()))
            row["of raw at its best"] = row["rows/s"] / max(raw.values())


def measure_latency(arguments: argparse.Namespace, best_rate: float) -> list[dict[str, Any]]:
    """Append at fixed rates; return a row for each."""
    rows = []
    for share in SHARES_OF_BEST:
        with fresh_file(arguments.on) as path:
            rate = share * best_rate
            load = uvloop.run(append_by_the_clock(path, arguments.producers, rate, arguments.seconds))
        spread = load.spread
        rows.append(
            {"due/s": rate, "acknowledged/s": load.done_per_second, "errors": load.errors.total()} | _millis(spread)
        )
    return rows


def _millis(spread: Spread) -> dict[str, float]:
    return {f"{name} ms": getattr(spread, name) * 1e3 for name in ("p50", "p90", "p99", "worst")}


def measure_kills(arguments: argparse.Namespace) -> dict[str, int]:
    total = Counter[str]()
    for number in range(arguments.kills):
        with fresh_file(arguments.on) as path:
            total.update(kill_in_the_middle(path, arguments.producers, 0.5 + number / 4))
    return {"kills": arguments.kills, **total}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--producers", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12_800, help="of one round of one side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one rate by the clock")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--on", type=Path, default=Path.cwd(), help="a directory on the disk that is meant")
    parser.add_argument("--append-forever", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    end_in_order()
    if arguments.append_forever is not None:
        uvloop.run(append_forever(arguments.append_forever, arguments.producers))
        return
    throughput = measure_throughput(arguments)
    add_shares(throughput)
    ours = throughput[0]
    print_table("Each goes on as soon as it is acknowledged; rows of 4 KB, medians of the rounds", throughput)
    latency = measure_latency(arguments, ours["rows/s"])
    print_table(f"{arguments.producers} producers, steps due by the clock", latency)
    kills = measure_kills(arguments)
    targets = {
        f">= {TARGET_SHARE:.0%} of raw, same batch": ours["of raw, same batch"] >= TARGET_SHARE,
        f"p99 <= {TARGET_P99_SECONDS * 1e3:g} ms": ours["p99 ms"] <= TARGET_P99_SECONDS * 1e3,
        "rows = acknowledgements after SIGKILL": not any(kills[name] for name in ("missing", "twice", "damaged")),
    }
    print_table(
        "SIGKILL under load; in flight: on the disk, and killed before it was told",
        [kills],
        notes=[f"{'reached' if is_reached else 'MISSED'}: {name}" for name, is_reached in targets.items()],
    )
    conditions = {name: value for name, value in vars(arguments).items() if isinstance(value, int | float)}
    found = {"latency": latency, "kills": kills, "targets": targets}
    write_json(arguments.json, "durable_log", throughput, conditions=conditions, **found)


if __name__ == "__main__":
    main()
