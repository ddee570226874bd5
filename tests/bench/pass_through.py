"""A pass-through request, against LiteLLM: the client's tools in the request, one model call, a tool call returned.

    python -m tests.bench.pass_through --litellm-venv DIR [--json FILE]

DIR is created, with `litellm[proxy]` in it, if it does not exist. Both servers are one process and ask the same
engine, which takes a fixed time; ours searches memory and has the episode on disk before it answers, the proxy stores
nothing. The result is the highest open-loop rate at which 99 % of the requests are answered within 50 ms and none
fails: rates rise in steps until one is too high, then the gap is halved. At the end each side is measured at half of
its own best rate, at the best rate of the other, and with one request at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from tests.bench.fixed_engine import FixedEngine
from tests.bench.measure import Load, make_parser, print_table, run_alone, run_open_loop, write_json
from tests.bench.server import Client, OurServer, Process, cpu_seconds, dump, end_in_order, free_port

DELAY_SECONDS = 0.01
P99_SECONDS = 0.05
FIRST_RATE, STEP, MIN_RATE = 15.0, 1.35, 1.0
NUM_HALVINGS = 2
NUM_FOR_P99 = 300
"""Minimum number of requests: with fewer, a single pause of the machine would decide the p99."""
MAX_OPEN = 200
NUM_WARM, NUM_ALONE = 100, 200
PIN = "litellm[proxy]==1.106.2"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{text} Returns what was found as text, or says that there is nothing.",
            "parameters": {
                "type": "object",
                "properties": {"number": {"type": "string", "description": "Its number, digits only."}},
                "required": ["number"],
            },
        },
    }
    for name, text in (("look_up", "Look an invoice up."), ("find_order", "Find an order."), ("ship", "Ship an order."))
]
SYSTEM = "You are the assistant of a trading company. Use the tools; answer in one sentence; never guess a number."


@dataclass
class Side:
    """A server under test, with keep-alive connections to it."""

    name: str
    process: Process
    model: str

    def __post_init__(self) -> None:
        self._client = Client(self.process.url, "/v1/chat/completions", {"Authorization": "Bearer none"})
        self._numbers = itertools.count()

    async def ask(self, _number: int) -> None:
        asked = f"This is request {next(self._numbers)}. When is invoice 4711 due, and was its order shipped?"
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]
        answer = await self._client.post(dump({"model": self.model, "messages": messages, "tools": TOOLS}))
        choice = json.loads(answer)["choices"][0]
        assert choice["finish_reason"] == "tool_calls", answer
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "look_up", answer

    async def at(self, per_second: float, seconds: float) -> dict[str, Any]:
        """Send requests at a rate (0: one after the other); return a row."""
        began = cpu_seconds(self.process.pid)
        if per_second:
            seconds = max(seconds, NUM_FOR_P99 / per_second)
            running = run_open_loop(
                self.ask, per_second=per_second, duration_seconds=seconds, seed=int(per_second), max_open=MAX_OPEN
            )
        else:
            running = run_alone(self.ask, num_requests=NUM_ALONE)
        load = await running
        cpu = (cpu_seconds(self.process.pid) - began) * 1e3 / max(1, len(load.spans))
        return self._row(load) | {"cpu_ms": round(cpu, 3)}

    def _row(self, load: Load) -> dict[str, Any]:
        keeps = load.keeps(P99_SECONDS) if load.due_per_second else None
        row = {"side": self.name, "due_per_second": round(load.due_per_second, 1)}
        row |= {"done_per_second": round(load.done_per_second, 1), "errors": load.errors.total(), "keeps": keeps}
        return row | load.spread.in_millis()


async def find_best_rate(side: Side, seconds: float, max_rate: float) -> tuple[float, list[dict[str, Any]]]:
    """Return the highest rate that the side sustains, and a row for every trial."""
    rows: list[dict[str, Any]] = []

    async def keeps(rate: float) -> bool:
        rows.append(await side.at(rate, seconds))
        if not rows[-1]["keeps"]:  # retried once: other load on the machine may be the cause
            rows.append(await side.at(rate, seconds))
        return bool(rows[-1]["keeps"])

    best, failed = FIRST_RATE, None
    while not await keeps(best):
        best, failed = best / 2, best
        if best < MIN_RATE:
            return 0.0, rows
    while failed is None:
        rate = min(best * STEP, max_rate)
        if rate > best and await keeps(rate):
            best = rate
        else:
            failed = rate
    for _ in range(NUM_HALVINGS):
        middle = (best + failed) / 2
        if await keeps(middle):
            best = middle
        else:
            failed = middle
    return best, rows


def prepare_venv(directory: Path) -> Path:
    """Return the proxy's program; install it into its own environment if it is missing."""
    program = directory / "bin" / "litellm"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        subprocess.run([directory / "bin" / "pip", "install", "-q", PIN], check=True, timeout=900)
    return program


@contextlib.contextmanager
def proxy(program: Path, engine_url: str) -> Iterator[Process]:
    """Run LiteLLM's proxy before the engine, without a database, as its documentation advises for speed."""
    parameters = {"model": "openai/base", "api_base": f"{engine_url}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": "agent", "litellm_params": parameters}],
        "litellm_settings": {"num_retries": 0, "set_verbose": False, "telemetry": False},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(config, file)  # valid YAML
        file.flush()
        port = free_port()
        command = [str(program), "--config", file.name, "--host", "127.0.0.1", "--port", str(port)]
        quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION"}
        quiet |= {"LITELLM_TELEMETRY": "False", "NO_DOCS": "True"}
        quiet |= {"LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}  # nor is one needed for our server
        url = f"http://127.0.0.1:{port}"
        process = Process([*command, "--num_workers", "1"], url, "/health/liveliness", env=os.environ | quiet)
        try:
            yield process
        finally:
            process.stop()


async def measure(
    program: Path, before: Path | None, *, seconds: float, max_rate: float
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Find each side's best rate, then measure all of them at the same rates; return the rows and the best rates."""
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(FixedEngine(delay_seconds=DELAY_SECONDS, num_tool_calls=1))
        theirs = Side("LiteLLM", stack.enter_context(proxy(program, engine.url)).settle(), "agent")
        ours = Side("ours", stack.enter_context(OurServer("--engine.url", engine.url)).settle(), "agent")
        sides = [theirs, ours]
        if before is not None:
            older = stack.enter_context(OurServer("--engine.url", engine.url, root=before))
            sides.append(Side("ours before", older.settle(), "agent"))
        for side in sides:
            warm = await run_alone(side.ask, num_requests=NUM_WARM)
            if warm.errors:
                await side.ask(0)  # raises the error itself
        best, rows = {}, []
        for side in sides:
            best[side.name], tried = await find_best_rate(side, seconds, max_rate)
            rows += tried
        at_ease = [0.0, *(sorted({round(rate * share, 1) for rate in best.values() for share in (0.5, 0.9)}))]
        for rate in at_ease:
            for side in sides:
                if rate <= best[side.name]:
                    rows.append(await side.at(rate, seconds))
        return rows, best


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--litellm-venv", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each rate that is tried")
    parser.add_argument("--max-rate", type=float, default=2_000.0, help="requests a second")
    parser.add_argument("--before", type=Path, help="an older checkout, to be measured beside this one")
    given = parser.parse_args()
    end_in_order()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        program = prepare_venv(given.litellm_venv)
        rows, best = runner.run(measure(program, given.before, seconds=given.seconds, max_rate=given.max_rate))
    ratio = best["ours"] / best["LiteLLM"] if best["LiteLLM"] else float("inf")
    notes = [f"best rate at p99 <= {P99_SECONDS * 1e3:g} ms: {best}: x{ratio:.2f}, to reach x4"]
    print_table("Pass-through: one model call, the client's tools; 0 a second is alone", rows, notes=notes)
    conditions = {"delay_ms": DELAY_SECONDS * 1e3, "p99_ms": P99_SECONDS * 1e3, "seconds": given.seconds}
    write_json(given.json, "pass_through", rows, conditions=conditions, best_per_second=best, notes=notes)


if __name__ == "__main__":
    main()
