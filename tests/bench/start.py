"""Time to ready and to a first answer, and memory at rest: `serve.py serve` with an embedded model on the real vLLM.

    python -m tests.bench.start [--model smollm2] [--json FILE]

Ready is when `/readyz` answers 200: the engine has generated a real token and serves the active policy. Memory is read
once loading has ended: RSS counts shared pages once for each process, PSS divides them among the processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

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
    """Yield all descendants of a process."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            yield child
            yield from descendants(child)


def describe(pid: int) -> str:
    """Return a process's role; vLLM names its own processes."""
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


def ask(url: str) -> str:
    """Return the answer to a question that any language model can answer."""
    body = {"model": "agent", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    body |= {"max_completion_tokens": 24}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    return reply.raise_for_status().json()["choices"][0]["message"]["content"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="smollm2", choices=["smollm2", "pocket"])
    given = parser.parse_args()
    end_in_order()
    with OurServer("--engine.model", given.model) as server:
        began = time.monotonic()
        answer = ask(server.url)
        answered = round(server.start_seconds + time.monotonic() - began, 1)
        seconds, rows = round(server.start_seconds, 1), measure(server)
    notes = [f"ready after {seconds} s, first answer after {answered} s: {answer!r}"]
    print_table(f"Memory at rest, with the {given.model} model on the real vLLM", rows, notes=notes)
    more = {"seconds_to_ready": seconds, "seconds_to_answer": answered, "answer": answer}
    write_json(given.json, "start", rows, conditions={"model": given.model}, **more)


if __name__ == "__main__":
    main()
