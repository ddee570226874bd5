"""An application on the fake engine, all of it over real HTTP, for third-party clients.

client -> loopback -> uvicorn -> agent -> loopback -> the fake engine. Token ids are the characters of the prompt,
rendered so that a reply is a part of the next prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memory.config import MemoryConfig
from memory.schema import Trajectory
from runtime.config import EngineConfig
from runtime.engine.process import Engine
from tests.runtime.api.worlds import ServedWorld
from tests.runtime.fake_engine import FakeEngine, Reply, Script, call, ids_of

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def forecast(request: dict[str, Any]) -> Reply:
    """A policy that requests the weather of each city in the question in parallel, and then repeats the results."""
    if request.get("response_format"):
        return Reply('{"city": "Oslo"}')
    heard = [message["content"] for message in request["messages"] if message["role"] == "tool"]
    asked = next(message["content"] for message in reversed(request["messages"]) if message["role"] == "user")
    cities = [city for city in ("Oslo", "Rome") if city in asked]
    if heard or not cities or not request.get("tools"):
        return Reply(f"Heard: {', '.join(heard)}" if heard else f"You said: {asked}")
    return Reply(calls=[it for city in cities for it in call("weather", city=city).calls])


def render_as_dialogue(body: dict[str, Any]) -> list[int]:
    """Render the messages so that a prompt and its reply begin the next prompt, as chat templates do."""
    lines = []
    for message in body["messages"]:
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        said = (message.get("content") or "") + "".join(call["name"] + call["arguments"] for call in calls)
        lines.append(f"<{message['role']}>{said}")
    return ids_of("".join(lines) + "<assistant>")


FORGETFUL = MemoryConfig(memory_tokens=0)
"""Shows no memory, so that tests that share a server do not affect each other's prompts."""


class PlayedWorld(ServedWorld):
    """A running server with a scripted fake engine over HTTP."""

    def __init__(
        self, data_dir: Path, script: Script = forecast, *, engine_config: dict[str, Any] | None = None, **more: Any
    ) -> None:
        super().__init__(data_dir, **more)
        self._engine_config = engine_config or {}
        self.fake = FakeEngine(script)
        self.fake.render_prompt = render_as_dialogue
        self._num_before = 0

    def begin_anew(self) -> None:
        """Restore the first script and restart the counts, for a server that several tests share."""
        self.fake.script, self.fake.breaks_off_after = forecast, None
        self.fake.requests.clear()
        self._num_before = len(self.memory.trajectories.select(limit=10_000))

    async def _serve(self) -> None:
        async with self.fake:
            engine = Engine(EngineConfig(url=self.fake.url, **self._engine_config), self.memory.data_dir)
            await engine.start()
            try:
                await self._serve_with(engine)
            finally:
                await engine.stop()

    @property
    def newest(self) -> Trajectory:
        """The trajectory that was opened last."""
        return self.memory.trajectories.select(limit=1)[0].trajectory

    @property
    def num_trajectories(self) -> int:
        return len(self.memory.trajectories.select(limit=10_000)) - self._num_before
