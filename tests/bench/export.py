"""An export of a million steps: its rate, and its memory beside that of an export of a hundredth.

    python -m tests.bench.export [--steps 1000000] [--format trl] [--on DIR] [--json FILE]

Episodes of 20 steps with their token ids are written into a SQLite file, unmeasured. Then a separate process reads
them as demonstrations and writes the rows to a file, as the route does for a client; its peak memory is the kernel's
figure. The floor is the same process that exports nothing.
"""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from memory.datasets.examples import Examples
from memory.datasets.exports import ExportContent, ExportQuery, Exports
from memory.formats.registry import find_format
from memory.records.trajectories import Trajectories
from memory.storage.database import Database
from runtime.api.datasets.export import stream_rows
from tests.bench.measure import make_parser, print_table, write_json
from tests.memory.datasets.bulk import STEPS_PER_EPISODE, store_episodes


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--format", default="trl")
    parser.add_argument("--on", type=Path, help="a directory on the disk that is meant")
    parser.add_argument("--read", type=Path, help="export this file, and print what it took (used by the benchmark)")
    arguments = parser.parse_args()
    if arguments.read is not None:
        print(json.dumps(export_file(arguments.read, arguments.format)))
        return
    rows = []
    for num_steps in (0, arguments.steps // 100, arguments.steps):
        with tempfile.TemporaryDirectory(dir=arguments.on) as directory:
            path = Path(directory) / "ratchet.db"
            asyncio.run(fill(path, num_steps))
            command = [sys.executable, "-m", "tests.bench.export", "--read", str(path), "--format", arguments.format]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"steps": num_steps, "database MB": path.stat().st_size // 10**6, **json.loads(done.stdout)})
    print_table(f"export of demonstrations as {arguments.format}", rows)
    write_json(arguments.json, "export", rows, conditions={"format": arguments.format})


async def fill(path: Path, num_steps: int) -> None:
    with closing(Database(path)) as database:
        await store_episodes(database, num_steps // STEPS_PER_EPISODE)


def export_file(path: Path, format_name: str) -> dict[str, Any]:
    """Export a database to a file beside it; return the time, the rate, the size and the peak memory."""
    with closing(Database(path)) as database:
        trajectories = Trajectories(database)
        exports = Exports(database, trajectories, Examples(database))
        started, left_out = time.perf_counter(), Counter[str]()
        with path.with_suffix(".jsonl").open("wb") as out:
            for lines in stream_rows(
                exports, ExportQuery(ExportContent.DEMONSTRATIONS), find_format(format_name), "", left_out
            ):
                out.write(lines)
            num_bytes = out.tell()
        seconds = time.perf_counter() - started
        num_rows = sum(1 for _ in path.with_suffix(".jsonl").open("rb"))
    assert not left_out
    return {
        "rows": num_rows,
        "seconds": round(seconds, 1),
        "steps/s": round(num_rows * STEPS_PER_EPISODE / seconds),
        "MB": num_bytes // 10**6,
        "peak memory MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


if __name__ == "__main__":
    main()
