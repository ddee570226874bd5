"""Two scripted players of cooking games that write the transcripts on which the pocket model is pretrained.

Both read only the game's text and follow one plan: read the recipe and number its directions, fetch the missing
ingredients, follow the directions, eat. The careful player checks its inventory first and skips directions that are
already done. The hasty one does not check, burns food that was already cooked, and so loses some games: the pocket
model has something left to learn. Occasionally a player makes a harmless useless move, so that the model sees how to
continue after one.

Before an action a player states its position in the plan and the kitchen rule that the action depends on:

    Now 2. fry the egg
    fry the _ -> cook _ with stove
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from runtime.environments.textworld import FAMILIES, CookingPlaythrough, TextWorld

# Each half of a rule is one token of the pocket model (optimizer/pretraining/tokenizer.py): new words need a new
# pretraining.
KITCHEN_RULES = {
    "fry": "cook _ with stove",
    "roast": "cook _ with oven",
    "chop": "chop _ with knife",
    "slice": "slice _ with knife",
    "dice": "dice _ with knife",
}
DONE_ADJECTIVES = {"fry": "fried", "roast": "roasted", "chop": "chopped", "slice": "sliced", "dice": "diced"}
CUTS = ("chop", "slice", "dice")
LAST_DIRECTION = "prepare meal"
DONE = " - done"


@dataclass
class Move:
    """One command, with the text before it, the game's observation after it, and the direction that it executes."""

    command: str
    says: str = ""
    """Lines about the plan, in the recipe's wording."""
    observation: str = ""
    direction: str | None = None
    """The verb of the recipe: fry, chop, ..."""
    is_idle: bool = False


@dataclass
class Transcript:
    seed: int
    task_text: str
    is_careful: bool
    moves: list[Move]
    is_won: bool


def play_as_expert(
    game: CookingPlaythrough, rng: random.Random, *, is_careful: bool = True, idle_rate: float = 0.0
) -> Transcript:
    """Play `game` to its end; before each planned command make useless moves with probability `idle_rate`."""
    transcript = Transcript(int(game.task.name), game.task_text, is_careful, [], False)
    for move in _plan(game.task_text, is_careful=is_careful):
        while rng.random() < idle_rate:
            _execute(game, Move(_idle_command(rng, transcript), is_idle=True), transcript)
        _execute(game, move, transcript)
        if game.is_done:
            break
    transcript.is_won = game.is_won
    return transcript


def _execute(game: CookingPlaythrough, move: Move, transcript: Transcript) -> None:
    if game.is_done:
        return
    move.observation = game.step(move.command)
    transcript.moves.append(move)


def _idle_command(rng: random.Random, transcript: Transcript) -> str:
    """Return a harmless command: looking around, an unknown word, or fetching the same thing again."""
    fetched = [move.command for move in transcript.moves if move.command.startswith(("take", "open"))]
    return rng.choice(("look", "open oven", "examine table", "examine counter", "take spoon", "wait", *fetched))


def _plan(task_text: str, *, is_careful: bool) -> Iterator[Move]:
    """Yield the planned moves. The caller must execute each one before the next: the plan reads its observation."""
    cookbook = Move("examine cookbook")
    yield cookbook
    ingredients, directions = read_recipe(cookbook.observation)
    lines = [*(f"{verb} the {food}" for verb, food in directions), LAST_DIRECTION]
    yield Move("open fridge", says="\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1)))
    # From the last such words: a room's description may contain them too.
    carried = task_text.rsplit("You are carrying", 1)[-1]
    for food in ingredients:
        if food not in carried:
            yield Move(f"take {food}")
    if any(verb in CUTS for verb, _ in directions):
        yield Move("take knife")
    holding = Move("inventory")
    if is_careful:
        yield holding
    skipped: list[str] = []
    for number, (verb, food) in enumerate(directions, start=1):
        now = f"Now {number}. {verb} the {food}"
        if is_done_already(holding.observation, food, verb):
            skipped.append(f"{now}{DONE}")
            continue
        yield Move(KITCHEN_RULES[verb].replace("_", food), says="\n".join([*skipped, now]), direction=verb)
        skipped = []
    yield Move(LAST_DIRECTION, says="\n".join([*skipped, f"Now {len(lines)}. {LAST_DIRECTION}"]))
    yield Move("eat meal")


def read_recipe(cookbook: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the ingredients and the (verb, food) directions of a cookbook page."""
    head, _, tail = cookbook.partition("Directions:")
    ingredients = [line for line in head.splitlines() if line and line != "Ingredients:"]
    directions = re.findall(r"^(\w+) the (.+)$", tail, re.MULTILINE)
    return ingredients, directions


def is_done_already(inventory: str, food: str, verb: str) -> bool:
    """Return whether the inventory describes the food as already fried, sliced, ..."""
    items = re.split(r",| and |:", inventory.replace(".", ""))
    return any(item.endswith(food) and DONE_ADJECTIVES[verb] in item.split() for item in items)


async def write_transcripts(
    environment: TextWorld, file: Path, *, num_games: int, on_progress: Callable[[int, int], None] | None = None
) -> int:
    """Let both players play the first `num_games` pretraining games, with and without useless moves; return the number
    of won games.

    The file is JSON with everything that pretraining needs: system prompt, tool definition, names of foods,
    transcripts. Lost games of the careful player are left out.
    """
    from textworld.challenges.tw_cooking.cooking import FOODS

    tasks = [environment.task(str(seed)) for seed in FAMILIES["pretraining"][:num_games]]
    await environment.prepare(tasks, on_progress)
    transcripts: list[dict[str, Any]] = []
    for task, is_careful, idle_rate in product(tasks, (True, False), (0.0, 0.1)):
        game = await environment.start(task)
        # Seeded by a string, so that runs are reproducible in any order.
        rng = random.Random(f"{task.name}-{is_careful}-{idle_rate}")
        transcript = play_as_expert(game, rng, is_careful=is_careful, idle_rate=idle_rate)
        tool = game.tools[0].definition()
        await game.close()
        if transcript.is_won or not is_careful:
            transcripts.append(asdict(transcript))
    source = {
        "system_prompt": environment.system_prompt,
        "tool": tool,
        "foods": sorted(FOODS),
        "transcripts": transcripts,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(source))
    return sum(transcript["is_won"] for transcript in transcripts)
