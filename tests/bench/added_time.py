"""Added time per agent step: everything but the model and the tool, at several rates.

    python -m tests.bench.added_time [--json FILE]

An episode is four calls of a tool that answers at once, and an answer: five model calls. Added time is the time in
which the engine computes nothing: before each of its calls, and after the last, by the engine's own clock.

    bare calls       the floor: the five calls, one after the other, and nothing else
    create_agent     LangGraph's `create_agent` with `ChatOpenAI`, as a library; keeps no log
    ours, library    `Agent.rollout` in the caller's process; every step is on disk before the next
    ours, HTTP       the server as `serve.py serve` starts it, asked over HTTP

Each side runs in its own process; the sides alternate. Rates count model calls; episodes arrive open-loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.bench.fixed_engine import FixedEngine, Stamp
from tests.bench.measure import Act, Load, Spread, make_parser, print_table, run_alone, run_open_loop, write_json
from tests.bench.server import Client, OurServer, cpu_seconds, dump, end_in_order
from tests.bench.tools import look_up

NUM_TOOL_CALLS = 4
NUM_STEPS = NUM_TOOL_CALLS + 1
DELAY_SECONDS = 0.02
NUM_ALONE = 40
NUM_WARM = 20
TARGET_RATE, TARGET_P99_SECONDS = 100, 0.010
DEFINITION = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look an invoice up.",
        "parameters": {"type": "object", "properties": {"number": {"type": "string"}}, "required": ["number"]},
    },
}


def ask(number: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"This is episode {number}. When is invoice 4711 due?"}]


@contextlib.asynccontextmanager
async def bare_calls(engine_url: str, _server_url: str) -> AsyncIterator[Act]:
    client = Client(engine_url, "/v1/chat/completions")

    async def play(number: int) -> None:
        messages = ask(number)
        while True:
            answer = await client.post(dump({"model": "base", "messages": messages, "tools": [DEFINITION]}))
            message = json.loads(answer)["choices"][0]["message"]
            if not message.get("tool_calls"):
                return
            call = message["tool_calls"][0]
            result = await look_up(**json.loads(call["function"]["arguments"]))
            messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": result}]

    with contextlib.closing(client):
        yield play


@contextlib.asynccontextmanager
async def create_agent_alone(engine_url: str, _server_url: str) -> AsyncIterator[Act]:
    from langchain.agents import create_agent
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=f"{engine_url}/v1", api_key="none", model="base", max_retries=0)
    agent = create_agent(model, tools=[look_up])

    async def play(number: int) -> None:
        state = await agent.ainvoke({"messages": ask(number)})
        assert len(state["messages"]) == 2 * NUM_STEPS, state

    yield play


@contextlib.asynccontextmanager
async def our_library(engine_url: str, _server_url: str) -> AsyncIterator[Act]:
    import logging

    import structlog

    from memory.schema import TrajectoryStage
    from memory.store import Memory
    from runtime.agent.graph import Agent
    from runtime.agent.turn import TurnRequest
    from runtime.config import EngineConfig
    from runtime.engine.process import Engine
    from runtime.serving.hotswap import HotSwap
    from runtime.tools.functions import tool_from_function

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as data, Memory.open(Path(data)) as memory:
        engine = Engine(EngineConfig(url=engine_url), memory.data_dir)
        await engine.start()
        await memory.policies.register_base(engine.model)
        agent = Agent(memory, HotSwap(memory.policies, engine), {}, tools=[tool_from_function(look_up)])

        async def play(number: int) -> None:
            trajectory = (await agent.rollout(TurnRequest(messages=ask(number)))).trajectory
            assert trajectory.stage is TrajectoryStage.FINISHED, trajectory
            assert trajectory.num_steps == NUM_STEPS + NUM_TOOL_CALLS, trajectory

        while not memory.index.has_vectors:
            await asyncio.sleep(0.1)
        yield play
        await engine.stop()


@contextlib.asynccontextmanager
async def our_server(_engine_url: str, server_url: str) -> AsyncIterator[Act]:
    client = Client(server_url, "/v1/chat/completions")

    async def play(number: int) -> None:
        answer = json.loads(await client.post(dump({"model": "agent", "messages": ask(number)})))
        assert answer["ratchet"]["num_turns"] == NUM_STEPS, answer

    with contextlib.closing(client):
        yield play


SIDES: dict[str, Callable[[str, str], contextlib.AbstractAsyncContextManager[Act]]] = {
    "bare calls": bare_calls,
    "create_agent": create_agent_alone,
    "ours, library": our_library,
    "ours, HTTP": our_server,
    "ours before, HTTP": our_server,
}


SERVED = ("ours, HTTP", "ours before, HTTP")
"""The second is run only if an older checkout is measured as well."""


class Worker:
    """One side, opened in a process of its own."""

    def __init__(self, name: str, engine_url: str, server_url: str) -> None:
        self.name = name
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, spawn, initializer=_open, initargs=(name, engine_url, server_url))
        self._pool.submit(_is_open).result()

    def run(self, per_second: float, seconds: float) -> tuple[Load, float]:
        """Return the load of a run (rate 0: one request at a time) and its processor time."""
        return self._pool.submit(_run, per_second, seconds).result()

    def close(self) -> None:
        self._pool.submit(_close).result()
        self._pool.shutdown()


_opened: dict[str, Any] = {}
"""State of a worker's process: its event loop, its side's `play`, and its exit stack."""


def _open(name: str, engine_url: str, server_url: str) -> None:
    import uvloop

    runner, stack = asyncio.Runner(loop_factory=uvloop.new_event_loop), contextlib.AsyncExitStack()
    play = runner.run(stack.enter_async_context(SIDES[name](engine_url, server_url)))
    _opened.update(runner=runner, stack=stack, play=play)
    runner.run(run_alone(play, num_requests=NUM_WARM))


def _is_open() -> bool:
    return bool(_opened)


def _run(per_second: float, seconds: float) -> tuple[Load, float]:
    began = time.process_time()
    if per_second:
        running = run_open_loop(_opened["play"], per_second=per_second, duration_seconds=seconds)
    else:
        running = run_alone(_opened["play"], num_requests=NUM_ALONE)
    return _opened["runner"].run(running), time.process_time() - began


def _close() -> None:
    _opened["runner"].run(_opened["stack"].aclose())
    _opened["runner"].close()


def added_seconds(load: Load, stamps: dict[int, list[Stamp]]) -> list[float]:
    """Return the added time of each step: before its model call and, for the last step, also after it."""
    added = []
    for number, (due_at, done_at) in load.spans.items():
        calls = stamps[number]
        assert len(calls) == NUM_STEPS, f"episode {number} made {len(calls)} model calls"
        before = [due_at, *(left for _, left in calls[:-1])]
        gaps = [came - left for (came, _), left in zip(calls, before, strict=True)]
        gaps[-1] += done_at - calls[-1][1]
        added += gaps
    return added


def measure(rates: list[float], before: Path | None, *, seconds: float, num_turns: int) -> list[dict[str, Any]]:
    """Run every side at every rate, alternating; return one row for each pair."""
    found: dict[tuple[float, str], list[tuple[Load, list[float], float]]] = {}
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(FixedEngine(delay_seconds=DELAY_SECONDS, num_tool_calls=NUM_TOOL_CALLS))
        arguments = ("--engine.url", engine.url, "--tools.functions", '["tests.bench.tools:look_up"]')
        servers = {"ours, HTTP": stack.enter_context(OurServer(*arguments)).settle()}
        if before is not None:
            servers["ours before, HTTP"] = stack.enter_context(OurServer(*arguments, root=before)).settle()
        urls = {name: server.url for name, server in servers.items()}
        names = [name for name in SIDES if name in servers or name not in SERVED]
        opened = (Worker(name, engine.url, urls.get(name, "")) for name in names)
        workers = [stack.enter_context(contextlib.closing(worker)) for worker in opened]
        for rate in rates:
            for _ in range(num_turns):
                for worker in workers:
                    engine.stamps()
                    server = servers.get(worker.name)
                    began = cpu_seconds(server.pid) if server else 0.0
                    load, cpu = worker.run(rate / NUM_STEPS, seconds / num_turns)
                    if server is not None:  # the server's, not the caller's
                        cpu = cpu_seconds(server.pid) - began
                    added = added_seconds(load, engine.stamps())
                    found.setdefault((rate, worker.name), []).append((load, added, cpu))
    return [_row(rate, name, runs) for (rate, name), runs in found.items()]


def _row(rate: float, name: str, runs: list[tuple[Load, list[float], float]]) -> dict[str, Any]:
    added = [seconds for _, seconds_each, _ in runs for seconds in seconds_each]
    num_errors = sum(load.errors.total() for load, _, _ in runs)
    cpu = sum(cpu for _, _, cpu in runs) / max(1, len(added))
    asked = f"{rate:g} a second" if rate else "alone"
    row = {"steps": asked, "side": name, "num_steps": len(added), "errors": num_errors}
    return row | Spread.of(added).in_millis() | {"cpu_ms_a_step": round(cpu * 1e3, 3)}


def judge(rows: list[dict[str, Any]]) -> list[str]:
    """Return the ratios to `create_agent`, and the p99 beside its target."""
    at = {(row["steps"], row["side"]): row for row in rows}
    lines = []
    for asked in dict.fromkeys(row["steps"] for row in rows):
        theirs = at[asked, "create_agent"]
        for side in ("ours, library", "ours, HTTP"):
            ours = at[asked, side]
            ratios = " ".join(f"{name} x{ours[f'{name}_ms'] / theirs[f'{name}_ms']:.2f}" for name in ("p50", "p99"))
            lines.append(f"{asked}: {side} against create_agent: {ratios}")
    target = at.get((f"{TARGET_RATE} a second", "ours, HTTP"))
    if target is not None:
        lines.append(f"p99 <= {TARGET_P99_SECONDS * 1e3:g} ms at {TARGET_RATE} steps a second: {target['p99_ms']} ms")
    return lines


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rates", type=float, nargs="*", default=[0, 25, 100, 150], help="steps a second; 0: alone")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each side at each rate")
    parser.add_argument("--turns", type=int, default=2, help="how often the sides take turns at a rate")
    parser.add_argument("--before", type=Path, help="an older checkout, to be measured beside this one")
    given = parser.parse_args()
    end_in_order()
    rows = measure(given.rates, given.before, seconds=given.seconds, num_turns=given.turns)
    notes = judge(rows)
    print_table("Added time of an agent's step: all but the model and the tool", rows, notes=notes)
    conditions = {"delay_ms": DELAY_SECONDS * 1e3, "num_tool_calls": NUM_TOOL_CALLS, "seconds": given.seconds}
    write_json(given.json, "added_time", rows, conditions=conditions, notes=notes)


if __name__ == "__main__":
    main()
