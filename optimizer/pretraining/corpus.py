"""Endless pretraining episodes from a few hundred transcripts: every one in a kitchen with rules of its own.

The transcripts come from one real game family, whose rules never change. A model that saw them as they are would know
the rules, and could neither need a memory nor improve. So each episode permutes them in the text: "fry" in this recipe
may mean the oven, and "chop" the dicing cut. Without memory the model can only guess; with the rules in its memory it
can look them up. Foods are renamed in half of the episodes, so that names are copied, not learned by heart.

Most episodes are those of a hasty cook: the value of care is not taught here either.

This module depends on no environment, tokenizer or optimizer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from memory.records.exemplars import MAX_CHARS, cut
from optimizer.pretraining.chat import Piece, action, header, observation, user

COOKING = {"fry": "cook _ with stove", "roast": "cook _ with oven"}
CUTTING = {"chop": "chop _ with knife", "slice": "slice _ with knife", "dice": "dice _ with knife"}
FORMS = {  # every form in which a rule's verb is seen
    "fry": ("fry", "fried"),
    "roast": ("roast", "roasted"),
    "chop": ("chop", "chopped"),
    "slice": ("slice", "sliced"),
    "dice": ("dice", "diced"),
}
OTHER_FORMS = {  # verbs that no kitchen of the game knows
    "grill": "grilled",
    "boil": "boiled",
    "steam": "steamed",
    "bake": "baked",
    "toast": "toasted",
    "braise": "braised",
    "poach": "poached",
    "sear": "seared",
    "peel": "peeled",
    "mince": "minced",
    "grate": "grated",
    "mash": "mashed",
}
OTHER_CUES = tuple(OTHER_FORMS)
OTHER_RULES = ("cook _ with BBQ", "cook _ with pan", "cook _ with pot", "cook _ with grill", "cook _ with toaster")
OTHER_CUTS = ("peel _ with knife", "mince _ with knife", "grate _ with grater", "mash _ with fork")
LAST_DIRECTION = "prepare meal"
DONE = " - done"
MAX_DIRECTIONS = 14
# the tokenizer is trained with these: a change of one needs a new tokenizer, and so a new model
PHRASES = (
    "Now ",
    DONE,
    *(f"{number}. " for number in range(1, MAX_DIRECTIONS + 2)),
    *(f"{cue} the _ ->" for cue in (*COOKING, *CUTTING, *OTHER_CUES)),
    *(f" {rule}" for rule in (*COOKING.values(), *CUTTING.values(), *OTHER_RULES, *OTHER_CUTS)),
)
"""Texts that the tokenizer makes one token each."""
SYLLABLES = re.findall("..", "babodadifefugagokakilalomaminanopaperarisasotatovaviwawoyazu")
COLOURS = ("red", "green", "yellow", "white", "black", "purple", "orange")


@dataclass(frozen=True)
class Weights:
    """Loss per token by the kind of token."""

    agent: float = 1.0
    rule: float = 3.0  # a rule that can be looked up
    guess: float = 1.0  # a rule that can only be guessed
    observed: float = 0.1
    opening: float = 0.03


class Mixture(NamedTuple):
    """Shares of the dense exercises; the rest are whole games."""

    recitals: float
    drills: float


MEMORIES = {"none": 0.3, "insights": 0.3, "exemplar": 0.1, "both": 0.3}
"""Shares of whole games by the content of their memory."""
# On purpose: only habits that lose games leave something to preferences (docs/log.md). The model card says so.
HASTY_SHARE = 0.7


class Corpus:
    """A source of episodes, each a list of pieces. `transcripts` are plain dicts (see `transcripts.jsonl`)."""

    def __init__(
        self,
        transcripts: Sequence[dict[str, Any]],
        foods: Sequence[str],
        *,
        system_prompt: str,
        tool: dict[str, Any],
        seed: int,
        weights: Weights = Weights(),
    ) -> None:
        if not transcripts:
            raise ValueError("no transcripts to pretrain on: write some first")
        self.transcripts = {
            is_careful: [each for each in transcripts if each["is_careful"] == is_careful]
            for is_careful in (True, False)
        }
        self.won = [each for each in transcripts if each["is_won"]]
        self.foods = list(foods)
        self.header = header(system_prompt, tool)
        self.weights = weights
        self.rng = random.Random(seed)

    def episode(self, mixture: Mixture) -> list[Piece]:
        # one generator for everything: an added draw changes every later episode of a seed
        kind = self.rng.random()
        if kind < mixture.recitals:
            return self.recital()
        return self.drill() if kind < mixture.recitals + mixture.drills else self.play()

    def play(self) -> list[Piece]:
        """One whole game, with as much memory as `MEMORIES` says."""
        kitchen = Kitchen.draw(self.rng, self.foods)
        # a bool is the key: True is the careful cook, whose games are all won (write_transcripts)
        cooks = self.transcripts[self.rng.random() >= HASTY_SHARE] or self.won
        transcript = self.rng.choice(cooks)
        kind = self.rng.choices(list(MEMORIES), list(MEMORIES.values()))[0]
        known: set[str] = set()
        sections = []
        if kind in ("insights", "both"):
            lines, known = self._insights(kitchen.rules())
            sections.append("Insights:\n" + "\n".join(lines))
        if kind in ("exemplar", "both"):
            other = self.rng.choice(self.won)
            shown = kitchen.with_other_foods(self.rng, self.foods)
            sections.append("Solved before:\n" + self._exemplar(other, shown))
            known |= {shown.shown_verb(move["direction"]) for move in other["moves"] if move["direction"]}
        memory = "<memory>\n" + "\n".join(sections) + "\n</memory>\n\n" if sections else ""
        pieces = [Piece(self.header, 0.0), *self._opening(memory, kitchen.see(transcript["task_text"]))]
        for move in transcript["moves"]:
            pieces += self._move(move, kitchen, known)
        return pieces

    def recital(self) -> list[Piece]:
        """A memory, then its lines again and again in any order: looking things up and nothing else."""
        rng, lookup = self.rng, self.weights.rule
        things = [*self.foods, *OTHER_CUES, *COLOURS]
        if rng.random() < 0.7:
            cues = [f"{cue} the _ ->" for cue in rng.sample([*COOKING, *CUTTING, *OTHER_CUES], rng.randint(3, 10))]
            answers = [*COOKING.values(), *CUTTING.values(), *OTHER_RULES, *OTHER_CUTS]
        else:
            cues, answers = [f"{thing} ->" for thing in rng.sample(things, rng.randint(3, 10))], things
        taught = {cue: f" {rng.choice(answers)}" for cue in cues}
        memory = (
            "<memory>\nInsights:\n" + "\n".join(f"- {cue}{answer}" for cue, answer in taught.items()) + "\n</memory>"
        )
        pieces = [Piece(self.header, 0.0), *user(memory, self.weights.opening), Piece("<|im_start|>assistant\n", 0.0)]
        for number, cue in enumerate(rng.choices(cues, k=80)):
            pieces += [Piece("\n" if number else "", 0.0), Piece(cue, 0.0), Piece(taught[cue], lookup)]
        return [*pieces, Piece("<|im_end|>\n", 0.0)]

    def drill(self) -> list[Piece]:
        """A long recipe and nothing else to do: where are we, is it done already, and which rule is it, many times.

        Some of the rules exist in no kitchen.
        """
        rng, agent = self.rng, self.weights.agent
        rules = Kitchen.draw(rng, self.foods).rules()
        if rng.random() < 0.6:
            cues = rng.sample([*rules, *OTHER_CUES], rng.randint(3, 8))
            actions = [*COOKING.values(), *CUTTING.values(), *OTHER_RULES, *OTHER_CUTS]
            rules = {cue: rng.choice(actions) for cue in cues}
        lines = [f"- {cue} the _ -> {rule}" for cue, rule in rules.items()]
        rng.shuffle(lines)
        memory = "<memory>\nInsights:\n" + "\n".join(lines) + "\n</memory>\n\n"
        foods = list(dict.fromkeys(rng.sample(self.foods, 3) + [invented_food(rng) for _ in range(3)]))
        every = [(cue, food) for food in foods for cue in rules]
        directions = rng.sample(every, min(len(every), rng.randint(6, MAX_DIRECTIONS)))
        if rng.random() < 0.5:
            directions.sort(key=lambda direction: foods.index(direction[1]))
        done_share = rng.choice([0.0, 0.3, 0.5])
        done = {direction for direction in directions if rng.random() < done_share}
        cookbook = [*(f"{cue} the {food}" for cue, food in directions), LAST_DIRECTION]
        plan = "\n".join(f"{number}. {line}" for number, line in enumerate(cookbook, start=1))
        pieces = [Piece(self.header, 0.0), *self._opening(memory, "You are hungry! Follow the cookbook.")]
        pieces += [*action("examine cookbook", agent), *observation("Directions:\n" + "\n".join(cookbook), 0.0)]
        pieces += [*action("inventory", agent, says=plan), *observation(self._holding(foods, done), 0.0)]
        says = ""
        for number, (cue, food) in enumerate(directions, start=1):
            says += f"Now {number}. {cue} the {food}"
            if (cue, food) in done:
                says += f"{DONE}\n"
                continue
            pieces += action(
                rules[cue].replace("_", food),
                agent,
                says=says,
                cue=f"{cue} the _",
                rule=rules[cue],
                rule_weight=self.weights.rule,
            )
            pieces += observation(f"You {cue} the {food}.", 0.0)
            says = ""
        says += f"Now {len(cookbook)}. {LAST_DIRECTION}"
        return [*pieces, *action(LAST_DIRECTION, agent, says=says), *observation("*** The End ***", 0.0)]

    def _holding(self, foods: Sequence[str], done: set[tuple[str, str]]) -> str:
        """Return an inventory that shows the directions done already."""
        forms = {verb: form for verb, form in FORMS.values()} | OTHER_FORMS
        items = ["a knife"] if self.rng.random() < 0.5 else []
        for food in foods:
            words = [forms[cue] for cue, of in sorted(done) if of == food]
            self.rng.shuffle(words)
            items.append(" ".join(["a", *(words or self.rng.choice([[], ["raw"]])), food]))
        self.rng.shuffle(items)
        return f"You are carrying: {', '.join(items[:-1])} and {items[-1]}."

    def _opening(self, memory: str, task_text: str) -> list[Piece]:
        return user(memory + task_text, self.weights.opening)

    def _move(self, move: dict[str, Any], kitchen: Kitchen, known: set[str]) -> list[Piece]:
        weights, command, says = self.weights, kitchen.rename(move["command"]), kitchen.see(move["says"])
        seen = observation(kitchen.see(move["observation"]), weights.observed)
        if move["is_idle"]:
            return [*action(command, 0.0), *seen]
        if not move["direction"]:
            return [*action(command, weights.agent, says=says), *seen]
        cue = kitchen.shown_verb(move["direction"])
        rule_weight = weights.rule if cue in known else weights.guess
        known.add(cue)  # the rest of the episode shows it
        rule = {**COOKING, **CUTTING}[move["direction"]]
        thought = {"says": says, "cue": f"{cue} the _", "rule": rule, "rule_weight": rule_weight}
        return [*action(command, weights.agent, **thought), *seen]

    def _insights(self, rules: dict[str, str]) -> tuple[list[str], set[str]]:
        """Return memory lines for most of the rules, in any order, and which rules they are."""
        share = self.rng.choice([1.0, 1.0, 0.7])
        taught = {cue: rule for cue, rule in rules.items() if self.rng.random() < share} or dict(rules)
        lines = [f"- {cue} the _ -> {rule}" for cue, rule in taught.items()]
        for cue in self.rng.sample(OTHER_CUES, self.rng.choice([0, 0, 0, 1, 2])):
            lines.append(f"- {cue} the _ -> {self.rng.choice(OTHER_RULES + OTHER_CUTS)}")
        self.rng.shuffle(lines)
        return lines, set(taught)

    @staticmethod
    def _exemplar(transcript: dict[str, Any], kitchen: Kitchen) -> str:
        """Return the transcript as `memory.records.exemplars.render_exemplar` would show it."""
        lines = [cut(kitchen.see(transcript["task_text"]))]
        for move in transcript["moves"]:
            if move["is_idle"]:
                continue
            thought = kitchen.see(move["says"])
            if move["direction"]:
                verb = move["direction"]
                thought += f"\n{kitchen.shown_verb(verb)} the _ -> {({**COOKING, **CUTTING})[verb]}"
            # cut as memory/records/exemplars.py cuts, or the model sees other exemplars when it serves
            lines.append(" ".join(thought.split())[:MAX_CHARS])
            lines += [f"> {kitchen.rename(move['command'])}", cut(kitchen.see(move["observation"]))]
        return "\n".join(line for line in lines if line)


@dataclass(frozen=True)
class Kitchen:
    """One episode's rules and names: the verb that the text shows for each true one, and the names of the foods."""

    verbs: dict[str, str]
    foods: dict[str, str]
    pattern: re.Pattern[str]
    words: dict[str, str]

    @classmethod
    def draw(cls, rng: random.Random, foods: Sequence[str]) -> Kitchen:
        verbs = {}
        for rules in (COOKING, CUTTING):
            verbs |= dict(zip(rules, rng.sample(list(rules), len(rules)), strict=True))
        return cls.of(verbs, draw_food_names(rng, foods))

    @classmethod
    def of(cls, verbs: dict[str, str], foods: dict[str, str]) -> Kitchen:
        forms = {old: new for true, shown in verbs.items() for old, new in zip(FORMS[true], FORMS[shown], strict=True)}
        words = {**forms, **foods}
        # a regular expression takes the first alternative that fits: "red apple" must come before "apple"
        longest_first = sorted(words, key=len, reverse=True)
        return cls(verbs, foods, re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})\b"), words)

    def with_other_foods(self, rng: random.Random, foods: Sequence[str]) -> Kitchen:
        return self.of(self.verbs, draw_food_names(rng, foods))

    def see(self, text: str) -> str:
        """Return a text of the game in this kitchen's words."""
        # one pass: replaced one after the other, fry -> roast -> fry would undo itself
        return self.pattern.sub(lambda match: self.words[match[0]], text)

    def rename(self, command: str) -> str:
        """Return a command with this kitchen's foods; its verb and its appliance stay those that work."""
        return self.pattern.sub(lambda match: self.foods.get(match[0], match[0]), command)

    def shown_verb(self, true_verb: str) -> str:
        return self.verbs[true_verb]

    def rules(self) -> dict[str, str]:
        return {self.verbs[verb]: rule for verb, rule in {**COOKING, **CUTTING}.items()}


def draw_food_names(rng: random.Random, foods: Sequence[str]) -> dict[str, str]:
    """Return a new name for every food: its own in half of the episodes, else another's or an invented one."""
    if rng.random() < 0.5:
        return {food: food for food in foods}
    names = list(foods) + [invented_food(rng) for _ in range(len(foods) // 2)]
    # sorted: the order of a set of strings differs between processes
    return dict(zip(foods, rng.sample(sorted(set(names)), len(foods)), strict=True))


def invented_food(rng: random.Random) -> str:
    noun = "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3)))
    return f"{rng.choice(COLOURS)} {noun}" if rng.random() < 0.4 else noun
