"""What a swap costs the requests in flight: 32 streams on the real vLLM, with swaps and without.

    python -m tests.bench.swap [--swaps 500] [--streams 32] [--json FILE]    # 500 take some ten minutes on 2 cores

Every swap loads: there are more adapters than stay resident, and one is activated again only after the engine has
unloaded it, so that each swap loads one, probes it, activates it and unloads another. Both sides alternate in one run
on one engine, with durability on: each stream plays episodes of two model calls one after the other, and every step is
on disk before the next.
Invariant: an episode counts as mixed if any of its model calls went to another model than the one it was opened with.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from memory.config import MemoryConfig
from memory.schema import Trajectory, TrajectoryStage
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.config import AgentConfig, EngineConfig
from runtime.engine.client import Completion, Delta, Message, OnDelta
from runtime.engine.model_families import POCKET_MODEL
from runtime.engine.process import Engine
from runtime.serving.hotswap import NUM_IDLE_KEPT, HotSwap
from runtime.tools.base import Tool
from tests.bench.measure import Spread, make_parser, print_table, write_json
from tests.bench.server import end_in_order
from tests.memory.episodes import HashingEncoder
from tests.runtime import tiny_models
from tests.support.rollouts import play

NUM_ADAPTERS = NUM_IDLE_KEPT + 6
NUM_ROUNDS = 4
WARM_UP_SECONDS = 10.0
MAX_STILL_SECONDS = 40.0
MAX_STEPS = 2
MAX_OUTPUT_TOKENS = 24
"""Episodes are short because an adapter stays loaded as long as one of its episodes is open."""
DRAIN_SECONDS = 10.0
OPENING = (
    "You are in a kitchen. There is a cookbook on the counter. Directions:\nfry the egg\nslice the onion\nprepare meal"
)
COMMAND = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}


class Side:
    """The measurements with swaps, or without."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gaps: list[float] = []
        """Seconds between two deltas of one reply, as its consumer receives them."""
        self.swaps: list[float] = []
        self.played: list[Trajectory] = []
        self.num_loads = 0
        self.num_pieces = 0
        self.seconds = 0.0

    def hear(self, before: float | None, now: float) -> None:
        self.num_pieces += 1
        if before is not None:
            self.gaps.append(now - before)

    def row(self, num_mixed: int) -> dict[str, Any]:
        num_failed = sum(trajectory.stage is not TrajectoryStage.FINISHED for trajectory in self.played)
        row = {"side": self.name, "swaps": len(self.swaps), "loads": self.num_loads, "episodes": len(self.played)}
        row |= {"failed": num_failed, "mixed": num_mixed, "pieces_per_second": round(self.num_pieces / self.seconds, 1)}
        for name, values in (("gap", self.gaps), ("swap", self.swaps)):
            if values:
                spread = Spread.of(values).in_millis()
                row |= {f"{name}_{figure}": spread[figure] for figure in ("p50_ms", "p99_ms", "worst_ms")}
        return row


class Streams:
    """A fixed number of concurrent episodes, without end; deltas count for the side being measured."""

    def __init__(self, memory: Memory, engine: Engine, hotswap: HotSwap) -> None:
        self.memory = memory
        self.hotswap = hotswap
        self.side = Side("warm-up")
        self.served: dict[str, set[str]] = defaultdict(set)
        """Episode -> the models that were requested of the engine."""
        act = Tool("act", "Do one thing.", COMMAND, self._act)
        config = AgentConfig(max_steps=MAX_STEPS, max_output_tokens=MAX_OUTPUT_TOKENS, max_seconds=600.0)
        self.agent = Agent(memory, hotswap, {}, config, tools=[act])
        self._numbers = itertools.count()
        self._note_what_is_served(engine)

    async def _act(self, arguments: dict[str, Any]) -> str:
        return "Nothing happens."

    def _note_what_is_served(self, engine: Engine) -> None:
        chat_stream = engine.client.chat_stream

        async def noted(
            model: str, messages: Sequence[Message], tools: Any = None, *, on_delta: OnDelta, **sampling: Any
        ) -> Completion:
            heard_at: float | None = None

            async def timed(delta: Delta) -> None:
                nonlocal heard_at
                before, heard_at = heard_at, time.monotonic()
                self.side.hear(before, heard_at)
                await on_delta(delta)

            self.served[messages[0]["content"]].add(model)
            return await chat_stream(model, messages, tools, on_delta=timed, **sampling)

        engine.client.chat_stream = noted  # type: ignore[method-assign]

    async def play(self) -> None:
        """Play one episode after the other. An episode belongs to the side on which it was opened."""

        async def ignore(delta: Delta) -> None:
            pass

        while True:
            name = f"{OPENING}\nKitchen {next(self._numbers)}."
            side, ask = self.side, [{"role": "user", "content": name}]
            side.played.append(await play(self.agent, messages=ask, temperature=1.0, on_delta=ignore))

    def is_mixed(self, trajectory: Trajectory) -> bool:
        wanted = self.memory.policies.get(trajectory.policy).adapter_path
        return self.served[trajectory.task_text] != {Path(wanted).name if wanted else "base"}


@contextlib.asynccontextmanager
async def open_streams(home: Path) -> AsyncIterator[Streams]:
    """Start the real engine with its own memory; close both."""
    paths = tiny_models.make_proved_adapters(POCKET_MODEL, home / "adapters", name="pocket", num=NUM_ADAPTERS)
    with Memory.open(home / "data", MemoryConfig(memory_tokens=0), encoder=HashingEncoder()) as memory:
        engine = Engine(EngineConfig(model="pocket", kv_cache_gib=1, startup_seconds=300), home / "data")
        try:
            await engine.start()
            await memory.policies.register_base("pocket")
            for path in paths:
                await memory.policies.draft(adapter_path=str(path), parent=0)
            hotswap = HotSwap(memory.policies, engine)
            for version in range(1, NUM_ADAPTERS + 1):  # warm-up: compile and read everything once
                await hotswap.activate(version)
            yield Streams(memory, engine, hotswap)
        finally:
            await engine.stop()


async def wait_until_unloaded(hotswap: HotSwap, version: int) -> bool:
    """Wait until an adapter without leases is unloaded; return False if it is not within `DRAIN_SECONDS`."""
    deadline = time.monotonic() + DRAIN_SECONDS
    while version in hotswap.loaded_versions and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return version not in hotswap.loaded_versions


async def measure(
    streams: Streams, still: Side, swapping: Side, *, num_swaps: int, num_streams: int, pause: float
) -> None:
    """Alternate phases with swaps and without, of equal length; record each phase on its side."""
    playing = [asyncio.create_task(streams.play()) for _ in range(num_streams)]
    versions = itertools.cycle(range(1, NUM_ADAPTERS + 1))
    try:
        await asyncio.sleep(WARM_UP_SECONDS)
        for round_number in range(NUM_ROUNDS):
            began = time.monotonic()
            streams.side = swapping
            for _ in range(num_swaps * (round_number + 1) // NUM_ROUNDS - len(swapping.swaps)):
                version = next(versions)
                swapping.num_loads += await wait_until_unloaded(streams.hotswap, version)
                swap_began = time.monotonic()
                await streams.hotswap.activate(version)
                swapping.swaps.append(time.monotonic() - swap_began)
                await asyncio.sleep(pause)
            seconds = time.monotonic() - began
            swapping.seconds += seconds
            streams.side = still
            await asyncio.sleep(min(seconds, MAX_STILL_SECONDS))
            still.seconds += min(seconds, MAX_STILL_SECONDS)
            print(f"round {round_number + 1} of {NUM_ROUNDS}: {len(swapping.swaps)} swaps, {seconds:.0f} s", flush=True)
            for task in playing:
                assert not task.done(), task.exception()
    finally:
        for task in playing:
            task.cancel()
        await asyncio.gather(*playing, return_exceptions=True)


async def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--swaps", type=int, default=500)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two swaps")
    given = parser.parse_args()
    end_in_order()
    sides = (Side("no swap"), Side("swaps"))
    with tempfile.TemporaryDirectory(prefix="swap-") as home:
        async with open_streams(Path(home)) as streams:
            settings = {"num_swaps": given.swaps, "num_streams": given.streams, "pause": given.pause}
            await measure(streams, *sides, **settings)
            rows = [side.row(sum(map(streams.is_mixed, side.played))) for side in sides]
    title = f"{given.swaps} swaps of an adapter each under {given.streams} streams, vLLM on this CPU, pocket model"
    notes = ["gap: between two pieces of one reply, as its listener hears them; swap: load, prove, point, unload"]
    print_table(title, rows, notes=notes)
    write_json(given.json, "swap", rows, conditions=settings)


if __name__ == "__main__":
    asyncio.run(main())
