"""A scripted cook that reads only what the game says: it writes the transcripts the pocket model is pretrained on.

It follows one plan: read the recipe, fetch what is missing, look at what it holds, follow the directions that are not
yet done, serve. Now and then it does something harmless and useless first, so that a student sees how to go on.
Before an action that depends on a rule of the kitchen it says the rule: `fry the _ -> cook _ with stove`.

Refuses to know tokens, prompts or models.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.environments.textworld import FAMILIES, CookingPlaythrough, TextWorld

KITCHEN_RULES = {
    "fry": "cook _ with stove",
    "roast": "cook _ with oven",
    "chop": "chop _ with knife",
    "slice": "slice _ with knife",
    "dice": "dice _ with knife",
}
DONE_ADJECTIVES = {"fry": "fried", "roast": "roasted", "chop": "chopped", "slice": "sliced", "dice": "diced"}
IDLE_COMMANDS = ("look", "inventory", "open oven", "examine table", "examine counter")


@dataclass
class Move:
    """One command, what the game answered, and the direction of the recipe that it carries out, if any."""

    command: str
    observation: str = ""
    direction: str | None = None  # the verb of the recipe: fry, chop, ...
    is_idle: bool = False


@dataclass
class Transcript:
    seed: int
    task_text: str
    moves: list[Move]
    is_won: bool


def play_as_expert(game: CookingPlaythrough, rng: random.Random, *, idle_rate: float = 0.0) -> Transcript:
    """Play `game` to its end; before each planned command idle with probability `idle_rate`."""
    transcript = Transcript(int(game.task.name), game.task_text, [], False)
    plan = _plan(game.task_text, transcript.moves)
    for move in plan:
        while rng.random() < idle_rate:
            _do(game, Move(rng.choice(IDLE_COMMANDS), is_idle=True), transcript)
        _do(game, move, transcript)
        if game.is_done:
            break
    transcript.is_won = game.is_won
    return transcript


def _do(game: CookingPlaythrough, move: Move, transcript: Transcript) -> None:
    if game.is_done:
        return
    move.observation = game.step(move.command)
    transcript.moves.append(move)


def _plan(task_text: str, moves: list[Move]) -> Iterator[Move]:
    """Yield the next planned move; what was observed meanwhile stands in `moves`."""
    cookbook = Move("examine cookbook")
    yield cookbook
    ingredients, directions = read_recipe(cookbook.observation)
    yield Move("open fridge")
    carried = task_text.rsplit("You are carrying", 1)[-1]
    for food in ingredients:
        if food not in carried:
            yield Move(f"take {food}")
    if any(verb in ("chop", "slice", "dice") for verb, _ in directions):
        yield Move("take knife")
    holding = Move("inventory")
    yield holding
    for verb, food in directions:
        if not is_done_already(holding.observation, food, verb):
            yield Move(KITCHEN_RULES[verb].replace("_", food), direction=verb)
    yield Move("prepare meal")
    yield Move("eat meal")


def read_recipe(cookbook: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the ingredients and the (verb, food) directions of a cookbook page."""
    head, _, tail = cookbook.partition("Directions:")
    ingredients = [line for line in head.splitlines() if line and line != "Ingredients:"]
    directions = re.findall(r"^(\w+) the (.+)$", tail, re.MULTILINE)
    return ingredients, directions


def is_done_already(inventory: str, food: str, verb: str) -> bool:
    """Say whether the food we hold is described as already fried, sliced, ..."""
    items = re.split(r",| and |:", inventory.replace(".", ""))
    return any(item.endswith(food) and DONE_ADJECTIVES[verb] in item.split() for item in items)


async def write_transcripts(
    environment: TextWorld, file: Path, *, num_games: int, on_progress: Callable[[int, int], None] | None = None
) -> int:
    """Play the first `num_games` pretraining games twice each, straight and with idling; return how many were won.

    The file holds all that pretraining needs to know: system prompt, tool definition, the names of foods, transcripts.
    """
    from textworld.challenges.tw_cooking.cooking import FOODS

    tasks = [environment.task(str(seed)) for seed in FAMILIES["pretraining"][:num_games]]
    await environment.prepare(tasks, on_progress)
    won, tool = [], None
    for task in tasks:
        for idle_rate in (0.0, 0.1):
            game = await environment.start(task)
            tool = game.tools[0].definition()
            transcript = play_as_expert(game, random.Random(f"{task.name}-{idle_rate}"), idle_rate=idle_rate)
            await game.close()
            if transcript.is_won:
                won.append(asdict(transcript))
    source = {"system_prompt": environment.system_prompt, "tool": tool, "foods": sorted(FOODS), "transcripts": won}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(source))
    return len(won)
