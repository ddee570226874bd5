"""TextWorld's cooking games: read the recipe, fetch, cut and cook its ingredients, eat the meal.

A task is a seed from one of three disjoint families; its game is compiled once (about a second) and cached. The reward
is the game's score divided by its maximum: a won game gives 1. Observations are the game's text without the banner, the
score lines and the cookbook's title page. TextWorld: Côté et al., 2018 (arXiv 1806.11532).
Hazard: TextWorld's parsers share global state; all games run on the single thread of `GAME_THREAD`.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from memory.schema import Split, Task
from runtime.environments.base import Environment, Outcome, Playthrough
from runtime.environments.compilers import CompilerPool
from runtime.errors import UnknownTask
from runtime.tools.base import Tool

P = ParamSpec("P")
R = TypeVar("R")

# Never move a border or SEALED: seeds that a model trained on would become held-out, and old verdicts would compare
# other games.
FAMILIES = {
    "pretraining": range(100_000, 500_000),
    Split.PRACTICE: range(500_000, 900_000),
    Split.HELD_OUT: range(900_000, 1_000_000),
}
SEALED = range(990_000, 1_000_000)
"""Held-out seeds that `TextWorld.tasks` never returns."""
# This prompt and ACT are in every pretraining row: with other words the pocket model's weights no longer fit.
SYSTEM_PROMPT = "You play a text game. Reach its goal by calling act with one short command at a time."
ACT = {
    "type": "object",
    "properties": {"command": {"type": "string"}},
    "required": ["command"],
}
GAME_THREAD = ThreadPoolExecutor(1, thread_name_prefix="textworld")
"""The only thread that loads and steps games. A step takes about 2 ms."""


class TextWorld(Environment):
    """Cooking games by seed. A task's name is its seed; `cache_dir` holds the compiled games."""

    name = "textworld"
    system_prompt = SYSTEM_PROMPT
    temperature = 0.0  # sampling loses games, and would cost the release gate several tries of each task

    def __init__(self, cache_dir: Path, compilers: CompilerPool | None = None) -> None:
        self._cache_dir = cache_dir
        self._compilers = compilers or CompilerPool()

    def task(self, name: str) -> Task:
        seed = int(name) if name.isdecimal() else -1
        for family, seeds in FAMILIES.items():
            if seed in seeds:
                split = family if isinstance(family, Split) else Split.LIVE
                return Task(environment=self.name, name=str(seed), kind="cooking", split=split)
        families = ", ".join(f"{family} {seeds.start}..{seeds.stop - 1}" for family, seeds in FAMILIES.items())
        raise UnknownTask(f"textworld has no task {name!r}: a task is a seed ({families})")

    def tasks(self, split: Split, num_tasks: int, *, offset: int = 0) -> list[Task]:
        seeds = FAMILIES.get(split)
        if seeds is None:
            raise ValueError(f"textworld has no split {split!r}: use practice or held-out")
        named = range(seeds.start, min(seeds.stop, SEALED.start))  # the sealed seeds are inside of HELD_OUT
        return [self.task(str(seed)) for seed in named[offset : offset + num_tasks]]

    def sealed_tasks(self, num_tasks: int) -> list[Task]:
        return [self.task(str(seed)) for seed in SEALED[:num_tasks]]

    def is_sealed(self, name: str) -> bool:
        return name.isdecimal() and int(name) in SEALED

    async def prepare(self, tasks: Sequence[Task], on_progress: Callable[[int, int], None] | None = None) -> None:
        missing = sorted({task.name for task in tasks if not self._game_file(task.name).exists()})
        if not missing:
            return
        self._cache_dir.mkdir(parents=True, exist_ok=True)
        num_done = 0

        def on_compiled() -> None:
            nonlocal num_done
            num_done += 1
            if on_progress:
                on_progress(num_done, len(missing))

        await self._compilers.compile([(int(name), self._game_file(name)) for name in missing], on_compiled)

    async def start(self, task: Task) -> CookingPlaythrough:
        await self.prepare([task])
        return await _on_game_thread(CookingPlaythrough, task, self._game_file(task.name))

    def _game_file(self, name: str) -> Path:
        return self._cache_dir / f"cooking-{name}.z8"


class CookingPlaythrough(Playthrough):
    """One started cooking game, with its own interpreter."""

    def __init__(self, task: Task, game_file: Path) -> None:
        import textworld  # slow: here, so that listing tasks stays cheap

        # The interpreter warns that it cannot score unknown games; TextWorld scores them itself.
        warnings.filterwarnings("ignore", message="Game .* is not fully supported")
        infos = textworld.EnvInfos(score=True, max_score=True, won=True, lost=True, inventory=True)
        self._game = textworld.start(str(game_file), infos)
        # This constructor runs on GAME_THREAD as well: loading a game uses the shared parsers.
        self._state: Any = self._game.reset()
        self.task = task
        self.task_text = f"{readable(self._state.feedback)}\n{readable(self._state.inventory)}"
        self.tools = [
            Tool(name="act", description="Give the game one command.", parameters=ACT, call=self._act),
        ]

    async def _act(self, arguments: dict[str, Any]) -> str:
        return await _on_game_thread(self.step, arguments["command"])

    def step(self, command: str) -> str:
        """Execute `command` in the game; return the observation."""
        if self.is_done:
            return "The game is over."
        self._state, _, self.is_done = self._game.step(command)
        observation = readable(self._state.feedback)
        if self.is_done:
            self.closing_text = observation
        return observation

    @property
    def is_won(self) -> bool:
        return bool(self._state.won)

    async def close(self) -> Outcome:
        score, max_score = self._state.score, self._state.max_score
        ending = "won" if self._state.won else "lost" if self._state.lost else "left unfinished"
        await _on_game_thread(self._game.close)
        return Outcome(value=score / max_score, reason=f"{ending} with {score} of {max_score} points")


async def _on_game_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    return await asyncio.get_running_loop().run_in_executor(GAME_THREAD, partial(function, *args, **kwargs))


# The transcripts of pretraining passed here too: other observations are foreign to the pocket model.
_REMOVED_TEXT = re.compile(
    r"""
    ^.*?(?=You\ are\ hungry!)           # the banner
    | \n>[ ]*(-=.*)?$                   # the prompt and its status line
    | ^>.*$
    | Your\ score\ has\ just\ gone\ (up|down)\ by\ \w+\ points?\.
    | You\ scored\ \d+\ out\ of\ .*$    # the final score and the restart prompt, to the end
    | You\ open\ the\ copy\ of\ .*?\n\nIngredients   # the cookbook's title page
    """,
    re.VERBOSE | re.DOTALL,
)


def readable(text: str) -> str:
    """Return the game's text without banner, status line, score lines, title page and empty lines."""
    text = text.replace("Ingredients:", "\n\nIngredients:") if "You open the copy" in text else text
    text = _REMOVED_TEXT.sub(lambda m: "Ingredients" if m[0].endswith("Ingredients") else "", text)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def cooking_settings(seed: int) -> dict[str, int | bool | None]:
    """Return the difficulty of a seed's game: one room, 1 to 3 ingredients, most to be cut, some already cooked."""
    # The order of the draws defines every game: changing it changes all tasks.
    rng = random.Random(seed)
    num_ingredients = rng.choice([1, 2, 2, 3, 3])
    return {
        "recipe": num_ingredients,
        "take": rng.randint(1, num_ingredients),
        "open": rng.random() < 0.8,
        "cook": rng.random() < 0.6,
        "cut": rng.random() < 0.85,
        "drop": False,
        "go": 1,
        "recipe_seed": 0,
        "split": None,
    }


def compile_cooking_game(seed: int, game_file: Path) -> None:
    """Generate and compile the game of `seed` (about a second); the file appears complete or not at all."""
    import textworld
    from textworld.challenges.tw_cooking import cooking
    from textworld.generator import compile_game

    _skip_repeated_work()
    options = textworld.GameOptions()
    options.seeds = seed
    # TextWorld declares its settings as strings but documents and reads these types.
    game = cooking.make(cast(Mapping[str, str], cooking_settings(seed)), options)
    # Inform leaves a partial file behind when it is interrupted. The .json must exist before the .z8, because the
    # player needs both and the .z8 marks the game as compiled.
    partial = game_file.with_name(f"partial-{os.getpid()}-{game_file.name}")
    options.path, options.force_recompile = str(partial), True
    compile_game(game, options)
    partial.with_suffix(".json").replace(game_file.with_suffix(".json"))
    partial.replace(game_file)
    partial.with_suffix(".ni").unlink(missing_ok=True)


def _skip_repeated_work() -> None:
    """Patch TextWorld: load its knowledge base once per process, and don't compile each game twice for its
    walkthrough."""
    from functools import cache

    from textworld.generator.data import KnowledgeBase
    from textworld.generator.maker import GameMaker

    if not hasattr(KnowledgeBase.load, "cache_info"):
        KnowledgeBase.load = staticmethod(cache(KnowledgeBase.load))
        GameMaker.set_walkthrough = lambda self, commands: None
