"""A small server for tests: a scripted engine, doors to open, a learner whose cycles take no time.

Everything else is real: SQLite, the agent's graph, the swap, the application, the socket.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import structlog
import uvicorn

from memory.config import MemoryConfig
from memory.schema import Cycle, CycleStage, Policy, Split, Task
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.api.app import create_app
from runtime.api.gateway.connections import server_config
from runtime.api.services import Services
from runtime.config import AgentConfig, EngineConfig
from runtime.engine.client import Completion, Delta
from runtime.engine.model_families import DEFAULT_TEMPERATURE
from runtime.environments.base import Environment, Outcome, Playthrough
from runtime.errors import PolicyError, UnknownTask
from runtime.serving.hotswap import HotSwap
from runtime.tools.base import Tool
from tests.memory.episodes import PATIENT, HashingEncoder


class ScriptedEngine:
    """The fake at the engine's seam: its reply depends only on the last user message and the tools."""

    def __init__(self, log_path: Path) -> None:
        self.client = self
        self.model = "base"
        self.url = "http://scripted"
        self.model_path = None
        self.max_model_len: int | None = None
        self.takes_tools = True
        self.model_temperature = DEFAULT_TEMPERATURE
        self.log_path = log_path
        self.config = EngineConfig()
        self.is_ready = True
        self.num_restarts = 0
        self.on_restart = None
        self.calls: list[dict[str, Any]] = []
        self.num_cut_off = 0

    async def wait_until_ready(self, timeout_seconds: float) -> None:
        return None

    async def chat(self, model: str, messages: Sequence[dict], tools: Sequence[dict] | None = None, **sampling: Any):
        self.calls.append({"model": model, "messages": list(messages), "tools": tools, **sampling})
        asked = next(m["content"] for m in reversed(messages) if m["role"] == "user")
        tokens = {"prompt_token_ids": [1] * 10, "output_token_ids": [2] * 3}
        if "crash" in asked:
            raise PolicyError("the engine broke off")
        if "wait" in asked:
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                self.num_cut_off += 1
                raise
        names = [tool["function"]["name"] for tool in tools or []]
        if "open" in names:
            door = "left" if int(asked.rsplit(" ", 1)[-1]) % 2 == 0 else "right"
            return Completion(tool_calls=[_call("open", {"door": door})], finish_reason="tool_calls", **tokens)
        if "weather" in names:
            return Completion(tool_calls=[_call("weather", {"city": "Oslo"})], finish_reason="tool_calls", **tokens)
        return Completion(content=f"You said: {asked}", **tokens)

    async def chat_stream(self, model, messages, tools=None, *, on_delta, partial=None, **sampling):
        completion = await self.chat(model, messages, tools, **sampling)
        for word in completion.content.split(" ") if completion.content else []:
            await on_delta(Delta(word if word == "You" else f" {word}"))
        return completion

    async def count_tokens(self, model: str, messages: Sequence[dict], tools: Sequence[dict] | None = None) -> int:
        return 10

    async def probe(self, model: str | None = None) -> bool:
        return self.is_ready

    async def adapters(self) -> set[str]:
        return set()

    async def unload_adapter(self, name: str) -> None:
        return None


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": f"call-{name}", "type": "function", "function": function}


class Doors(Environment):
    """Two doors; behind the left one is the prize. Tasks below 50 are for practice, those from 9000 on are sealed."""

    name = "doors"
    system_prompt = "Open the right door, which is the left one."

    def task(self, name: str) -> Task:
        if not name.isdecimal():
            raise UnknownTask(f"doors has no task {name!r}: a task is a number")
        split = Split.PRACTICE if int(name) < 50 else Split.HELD_OUT
        return Task(environment=self.name, name=name, kind="opening", split=split)

    def tasks(self, split: Split, num_tasks: int, *, offset: int = 0) -> list[Task]:
        start = offset if split is Split.PRACTICE else 50 + offset
        return [self.task(str(number)) for number in range(start, start + num_tasks)]

    def sealed_tasks(self, num_tasks: int) -> list[Task]:
        return [self.task(str(number)) for number in range(9000, min(9000 + num_tasks, 9010))]

    async def start(self, task: Task) -> Playthrough:
        return AtTheDoors(task)


class AtTheDoors(Playthrough):
    """One choice, after which the task ends."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.task_text = f"Open a door. This is task {task.name}"
        self.opened: str | None = None
        schema = {"type": "object", "properties": {"door": {"type": "string"}}, "required": ["door"]}
        self.tools = [Tool("open", "Open a door.", schema, self.open)]

    async def open(self, arguments: dict[str, Any]) -> str:
        self.opened, self.is_done = arguments["door"], True
        self.closing_text = f"You opened the {self.opened} door."
        return self.closing_text

    async def close(self) -> Outcome:
        return Outcome(float(self.opened == "left"), f"opened {self.opened}")


class QuickLearner:
    """The fake at the learner's seam: a cycle through all stages, a report, a promotion, in a moment."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.is_held = False
        self.ends_badly = False
        self.needs: list[dict[str, Any]] = []
        self._turn: asyncio.Task | None = None

    async def start(self, settings: dict[str, Any], *, may_loosen_bars: bool = False) -> Cycle:
        if "nonsense" in settings:
            raise ValueError("unknown setting 'nonsense' (settings); the nearest is 'name'")
        cycle = await self.memory.cycles.open(settings)
        self._turn = asyncio.ensure_future(self._run(cycle.id))
        return cycle

    async def check(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        if "nonsense" in settings:
            raise ValueError("unknown setting 'nonsense' (settings); the nearest is 'name'")
        return self.needs

    async def cancel(self, cycle_id: str) -> Cycle:
        self._turn.cancel()
        return await self.memory.cycles.save(cycle_id, stage=CycleStage.ERROR, error="Cancelled: by request")

    async def decide_again(self, policy: Policy) -> dict[str, Any]:
        return {"decision": "uninformative", "reason": "nobody played"}

    async def _run(self, cycle_id: str) -> None:
        cycles = self.memory.cycles
        for stage in (CycleStage.COLLECT, "kto", "evaluate"):
            await cycles.save(cycle_id, stage=stage, progress={"done": 1, "total": 2, "message": "at work"})
            await asyncio.sleep(0.02)
            while self.is_held:
                await asyncio.sleep(0.02)
        if self.ends_badly:
            await cycles.save(cycle_id, stage=CycleStage.ERROR, error="TooFewTrajectories: 3 are missing")
            return
        made = await self.memory.policies.draft(system_prompt="The left one!", parent=0, cycle_id=cycle_id)
        await self.memory.policies.promote(made.version)
        directory = self.memory.data_dir / "reports" / cycle_id
        directory.mkdir(parents=True)
        (directory / "report.json").write_text('{"cells": {}}')
        (directory / "report.md").write_text("# Release report\n\nIt got better.\n")
        await cycles.save(
            cycle_id,
            stage=CycleStage.COMPLETED,
            verdict={"decision": "promote", "reason": "above the margin"},
            artifacts={"candidate": made.version},
        )


class ServedWorld:
    """An application with its own memory, on a loopback port, in its own thread."""

    def __init__(
        self,
        data_dir: Path,
        *,
        config: AgentConfig | None = None,
        tools: Sequence[Tool] = (),
        memory_config: MemoryConfig = PATIENT,
        base_model: str = "scripted",
        change: Callable[[Services], None] = lambda services: None,
    ) -> None:
        self.base_model = base_model
        self.change = change
        """A test's changes to the services, applied before anything is served."""
        self.config = config or AgentConfig(max_steps=4, max_seconds=20)
        self.tools = tools
        self.memory = Memory.open(data_dir, memory_config, encoder=HashingEncoder())
        self.engine = ScriptedEngine(data_dir / "logs" / "engine.log")
        self.learner = QuickLearner(self.memory)
        self.services: Services
        self.url = ""
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> ServedWorld:
        structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # standard output is for the commands
        self._thread.start()
        assert self._started.wait(30), "the application did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        self.memory.close()
        structlog.reset_defaults()

    async def _serve(self) -> None:
        await self._serve_with(self.engine)

    async def _serve_with(self, engine: Any) -> None:
        await self.memory.trajectories.close_orphans()
        await self.memory.policies.register_base(self.base_model)
        environments = {"doors": Doors()}
        hotswap = HotSwap(self.memory.policies, engine)
        agent = Agent(self.memory, hotswap, environments, self.config, tools=self.tools)
        self.services = Services(self.memory, agent, engine, hotswap, self.learner, environments)
        await hotswap.activate(0)
        self.change(self.services)
        app = create_app(self.services)
        config = server_config(app, self.services.limits, port=0, timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        serving = asyncio.ensure_future(self.server.serve())
        following = asyncio.ensure_future(hotswap.follow())
        while not self.server.started:
            await asyncio.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._started.set()
        await serving
        following.cancel()


def error_code(answer: httpx.Response) -> str:
    """Return the code of an error in the shape of either API."""
    error = answer.json()["error"]
    return error["code"] if "code" in error else error["details"]["error_code"]
