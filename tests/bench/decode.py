"""The rate at which the engine decodes: with and without an adapter, and with and without the core that vLLM reserves.

    python -m tests.bench.decode [--model smollm2] [--tokens 128] [--json FILE]

vLLM keeps one core of a CPU free for its own front end; with two cores that is half of the machine. Each side is a
server of its own; within it, the base and the active policy answer in turn. A core-second is one second of one core, of
the server and all processes under it, so a rate per core-second does not depend on how many cores there were.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.bench.measure import make_parser, print_table, write_json
from tests.bench.server import OurServer, Process, cpu_seconds, end_in_order
from tests.bench.start import descendants

RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
BATCHES = (1, 8, 32)
"""Requests at the same time."""
NUM_ROUNDS = 3
QUESTION = "Write a long story about town number {}, its people, its river and its weather."


def write(url: str, model: str, number: int, num_tokens: int) -> int:
    """Have one story written; return its tokens."""
    messages = [{"role": "user", "content": QUESTION.format(number)}]
    body = {"model": model, "messages": messages, "max_completion_tokens": num_tokens, "temperature": 0.7}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600, trust_env=False)
    return answer.raise_for_status().json()["usage"]["completion_tokens"]


def measure(server: Process, model: str, batch: int, num_tokens: int, first: int) -> tuple[int, float, float]:
    """Return (tokens, seconds, core-seconds) of so many stories at once."""
    pids = [server.pid, *descendants(server.pid)]
    cores, began = sum(map(cpu_seconds, pids)), time.monotonic()
    with ThreadPoolExecutor(batch) as pool:
        written = pool.map(lambda number: write(server.url, model, number, num_tokens), range(first, first + batch))
        tokens = sum(written)
    return tokens, time.monotonic() - began, sum(map(cpu_seconds, pids)) - cores


def measure_side(server: Process, num_tokens: int) -> list[dict[str, Any]]:
    """Return a row for each batch, with the rates of the base and of the active policy."""
    active = httpx.get(f"{server.url}/v1/policies", trust_env=False).raise_for_status().json()["active"]
    models = {"base": "agent@v0", "adapter": f"agent@{active}"}
    for model in models.values():  # the first request of a policy also loads what it needs
        write(server.url, model, 0, 8)
    rows = []
    for batch in BATCHES:
        totals = {name: [0.0, 0.0, 0.0] for name in models}
        for number in range(NUM_ROUNDS):  # in turn, so that both see the same machine
            for name, model in models.items():
                measured = measure(server, model, batch, num_tokens, first=1 + number * batch)
                totals[name] = [sum(pair) for pair in zip(totals[name], measured, strict=True)]
        per_core = {name: tokens / cores for name, (tokens, _, cores) in totals.items()}
        row: dict[str, Any] = {"requests at once": batch}
        for name, (tokens, seconds, _) in totals.items():
            row |= {f"{name}, tokens/s": round(tokens / seconds, 1)}
            row |= {f"{name}, tokens a core-second": round(per_core[name], 1)}
        rows.append({**row, "adapter to base": round(per_core["adapter"] / per_core["base"], 2)})
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="smollm2", choices=["smollm2", "pocket"])
    parser.add_argument("--tokens", type=int, default=128, help="of each story")
    given = parser.parse_args()
    end_in_order()
    rows = []
    for reserved in ("1", "0"):
        os.environ[RESERVED] = reserved
        with OurServer("--engine.model", given.model) as server:
            server.settle()
            rows += [{"cores reserved": int(reserved), **row} for row in measure_side(server, given.tokens)]
    print_table(f"Tokens decoded by the {given.model} model on the real vLLM", rows)
    write_json(given.json, "decode", rows, conditions={"model": given.model, "tokens": given.tokens})


if __name__ == "__main__":
    main()
