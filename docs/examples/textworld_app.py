"""A LangGraph agent that plays TextWorld's cooking games with a tool of its own.

An app as anybody could have written it: `create_agent`, `ChatOpenAI`, the `textworld` package. It knows the server only
by its `base_url`. TextWorld's own command makes a game for it:

    tw-make tw-cooking --recipe 2 --take 1 --open --cook --cut --go 1 --seed 500000 --output games/500000.z8
    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=none python docs/examples/textworld_app.py games/*.z8
"""

from __future__ import annotations

import asyncio
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import textworld
from langchain.agents import create_agent
from langchain.agents.middleware import before_model
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AnyMessage
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI

SYSTEM_PROMPT = "You play a text game. Reach its goal by calling act with one short command at a time."
COMMAND = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
MAX_COMMANDS = 24
INTRODUCTION = "You are hungry!"
NOISE = re.compile(
    r"\n>[^\n]*"  # the prompt, and the status line behind it
    r"|Your score has just gone (?:up|down) by \w+ points?\."
    r"|You scored \d+ out of .*",  # the tally at the end
    re.DOTALL,
)


@dataclass
class Ended:
    """How a game ended, and all its messages."""

    is_won: bool
    messages: list[AnyMessage]


class Game:
    """One game under way. TextWorld bears no two threads: everything happens on the event loop's."""

    def __init__(self, path: Path) -> None:
        wanted = textworld.EnvInfos(won=True, inventory=True)
        self._world = textworld.start(str(path), wanted)
        self._state = self._world.reset()
        self.num_commands = 0
        self.is_over = False
        text = self._state.feedback
        self.opening = f"{tidy(text[text.index(INTRODUCTION) :])}\n{tidy(self._state.inventory)}"

    async def act(self, command: str) -> str:
        self.num_commands += 1
        self._state, _, is_done = self._world.step(command)
        self.is_over = is_done or self.num_commands == MAX_COMMANDS
        return tidy(self._state.feedback)

    def close(self) -> bool:
        """Return whether it was won."""
        self._world.close()
        return bool(self._state.won)


def tidy(text: str) -> str:
    """Return what the game tells, without its scores and status lines."""
    text = re.sub(r"^>[^\n]*", "", text)
    if text.lstrip().startswith("You open the copy"):
        text = "Ingredients" + text.partition("Ingredients")[2]
    lines = (" ".join(line.split()) for line in NOISE.sub("", text).splitlines())
    return "\n".join(line for line in lines if line)


async def play(path: Path, model: BaseChatModel) -> Ended:
    """Play one game to its end."""
    game = Game(path)

    @before_model(can_jump_to=["end"])
    def stop_when_over(state: Any, runtime: Any) -> dict[str, Any] | None:
        return {"jump_to": "end"} if game.is_over else None

    act = StructuredTool(name="act", description="Give the game one command.", args_schema=COMMAND, coroutine=game.act)
    agent = create_agent(model, [act], system_prompt=SYSTEM_PROMPT, middleware=[stop_when_over])
    limit = {"recursion_limit": 6 * MAX_COMMANDS}
    result = await agent.ainvoke({"messages": [("user", game.opening)]}, limit)
    return Ended(game.close(), result["messages"])


async def main(paths: list[Path]) -> None:
    model = ChatOpenAI(model="agent", temperature=1.0, extra_body={"metadata": {"share": "true"}})  # nobody's words
    for path in paths:
        ended = await play(path, model)
        print(f"{path.name}: {'won' if ended.is_won else 'lost'} after {len(ended.messages)} messages")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Game .* is not fully supported")
    asyncio.run(main([Path(each) for each in sys.argv[1:]]))
