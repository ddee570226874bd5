"""Time to ready, and memory at rest: `serve.py serve` with the pocket model on the real vLLM.

    python -m tests.bench.start [--json FILE]

Ready is when `/readyz` answers 200: the engine has generated a real token and the active policy is worn. Memory is read
once nothing is loading any more: RSS counts what processes share once for each, PSS divides it among them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.measure import make_parser, print_table, write_json
from tests.bench.server import OurServer, Process, end_in_order

REST_SECONDS = 5.0


def read_memory(pid: int) -> tuple[float, float]:
    """Return a process's RSS and PSS in MiB."""
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        sizes[name] = int(rest.split()[0]) / 1024
    return sizes["Rss"], sizes["Pss"]


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that a process started, and those that these started."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            yield child
            yield from descendants(child)


def describe(pid: int) -> str:
    """Return what a process is: vLLM names its own."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    words = command.split()
    return command if len(words) < 2 else " ".join(Path(word).name for word in words[:3] if not word.startswith("-"))


def measure(server: Process) -> list[dict[str, Any]]:
    """Return a row for the server, one for each process under it, and one for all."""
    server.settle()
    time.sleep(REST_SECONDS)
    rows = []
    for pid in (server.pid, *descendants(server.pid)):
        rss, pss = read_memory(pid)
        rows.append({"process": describe(pid), "rss_mib": round(rss), "pss_mib": round(pss)})
    totals = {name: sum(row[name] for row in rows) for name in ("rss_mib", "pss_mib")}
    return [*rows, {"process": "all", **totals}]


def main() -> None:
    parser = make_parser(__doc__)
    given = parser.parse_args()
    end_in_order()
    with OurServer() as server:
        seconds, rows = round(server.start_seconds, 1), measure(server)
    note = f"ready after {seconds} s"
    print_table("Memory at rest, with the pocket model on the real vLLM", rows, notes=[note])
    write_json(given.json, "start", rows, conditions={"model": "pocket"}, seconds_to_ready=seconds)


if __name__ == "__main__":
    main()
