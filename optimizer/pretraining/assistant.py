"""Demonstrations of an assistant that uses tools, reads passages and answers briefly, made from templates.

    python -m optimizer.pretraining.assistant OUT.jsonl [--rows 600] [--seed 0]

They teach a small chat model the forms in which this runtime talks to it: tool definitions and results, and the memory
segment. Nothing is taken from a benchmark, and all names are invented. The file has OpenAI's `messages` and `tools`,
which `serve.py import` reads; runtime/smollm2/README.md says what was trained on it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimizer.pretraining.assistant_tools import FACTS, NAMES, PRODUCTS, TOOLS, TOWNS, ToolTemplate

Row = dict[str, Any]

NUM_DISTRACTORS = (0, 4)
"""Fewest and most tools that are offered beside the one to call."""


@dataclass
class Conversation:
    """A conversation while it is written."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, content: str) -> Conversation:
        self.messages.append({"role": "user", "content": content})
        return self

    def answer(self, content: str) -> Conversation:
        self.messages.append({"role": "assistant", "content": content})
        return self

    def call(self, *calls: tuple[str, dict[str, Any], str]) -> Conversation:
        """Add one reply with a call for each (tool, arguments, result), and the results."""
        made = []
        for name, arguments, _ in calls:
            number = sum(len(it.get("tool_calls", ())) for it in self.messages) + len(made)
            text = json.dumps(arguments, ensure_ascii=False)
            made.append({"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": text}})
        self.messages.append({"role": "assistant", "content": None, "tool_calls": made})
        for call, (_, _, result) in zip(made, calls, strict=True):
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        return self

    def to_row(self) -> Row:
        """Return it in OpenAI's form."""
        return {"messages": self.messages, **({"tools": self.tools} if self.tools else {})}


def write_one_call(draw: random.Random) -> Conversation:
    """One question that one of the tools answers."""
    tool = draw.choice(TOOLS)
    values = tool.draw_values(draw)
    talk = Conversation(tools=offer(draw, tool)).ask(tool.ask(draw, values))
    result, answer = tool.respond(draw, values)
    return talk.call((tool.name, tool.arguments(values), result)).answer(answer)


def write_two_calls(draw: random.Random) -> Conversation:
    """One question about two things, for which the same tool is called twice in one reply."""
    tool = draw.choice([it for it in TOOLS if it.pair])
    first, second = tool.draw_values(draw), tool.draw_values(draw)
    second |= {key: first[key] for key in first if key not in tool.subject}
    talk = Conversation(tools=offer(draw, tool)).ask(tool.ask_twice(first, second))
    made = [(tool.name, tool.arguments(values), *tool.respond(draw, values)) for values in (first, second)]
    talk.call(*((name, arguments, result) for name, arguments, result, _ in made))
    return talk.answer(" ".join(answer for *_, answer in made))


def write_no_call(draw: random.Random) -> Conversation:
    """A question that needs none of the tools that are offered."""
    question, answer = draw_fact(draw)
    return Conversation(tools=offer(draw)).ask(question).answer(answer)


def write_missing_value(draw: random.Random) -> Conversation:
    """A question that lacks what the tool needs; the assistant asks for it, and then calls."""
    tool = draw.choice([it for it in TOOLS if it.vague])
    values = tool.draw_values(draw)
    talk = Conversation(tools=offer(draw, tool)).ask(draw.choice(tool.vague)).answer(tool.question)
    result, answer = tool.respond(draw, values)
    reply = ", ".join(str(values[name]) for name in tool.subject)
    return talk.ask(reply).call((tool.name, tool.arguments(values), result)).answer(answer)


def write_fact(draw: random.Random) -> Conversation:
    """A question of general knowledge, without tools."""
    question, answer = draw_fact(draw)
    return Conversation().ask(question).answer(answer)


def write_passage(draw: random.Random) -> Conversation:
    """A question that the passages of the memory segment answer."""
    title, passage, question, answer = draw_passage(draw)
    others = [draw_passage(draw)[:2] for _ in range(draw.randint(0, 2))]
    shown = [f"{name}: {text}" for name, text in draw_order(draw, [(title, passage), *others])]
    memory = "\n".join(["<memory>", "Passages:", *shown, "</memory>"])
    return Conversation().ask(f"{memory}\n\n{question}").answer(answer)


def write_document_search(draw: random.Random) -> Conversation:
    """A question for which the assistant searches the documents."""
    title, passage, question, answer = draw_passage(draw)
    tool = next(it for it in TOOLS if it.name == "search_documents")
    result = "\n\n".join(f"{name}: {text}" for name, text in [(title, passage), draw_passage(draw)[:2]])
    query = question.removesuffix("?")
    return (
        Conversation(tools=offer(draw, tool)).ask(question).call((tool.name, {"query": query}, result)).answer(answer)
    )


KINDS: tuple[tuple[Callable[[random.Random], Conversation], int], ...] = (
    (write_one_call, 34),
    (write_two_calls, 10),
    (write_no_call, 8),
    (write_missing_value, 8),
    (write_fact, 14),
    (write_passage, 14),
    (write_document_search, 12),
)
"""Kinds of conversations, and their parts in a hundred."""


def offer(draw: random.Random, *wanted: ToolTemplate) -> list[dict[str, Any]]:
    """Return the definitions of the wanted tools among some others, in any order."""
    others = [tool for tool in TOOLS if tool not in wanted]
    chosen = [*wanted, *draw.sample(others, draw.randint(0 if wanted else 1, NUM_DISTRACTORS[1]))]
    return [tool.define() for tool in draw_order(draw, chosen)]


def draw_order(draw: random.Random, items: list[Any]) -> list[Any]:
    return draw.sample(items, len(items))


def draw_fact(draw: random.Random) -> tuple[str, str]:
    """Return a question and its answer."""
    if draw.random() < 0.3:
        first, second = draw.randint(2, 60), draw.randint(2, 60)
        return draw.choice(
            [
                (f"What is {first} plus {second}?", f"{first} + {second} = {first + second}."),
                (f"What is {first + second} minus {second}?", f"{first + second} - {second} = {first}."),
            ]
        )
    return draw.choice(FACTS)


def draw_passage(draw: random.Random) -> tuple[str, str, str, str]:
    """Return a title, a passage, a question about it and the answer."""
    product, town, person = draw.choice(PRODUCTS), draw.choice(TOWNS), draw.choice(NAMES)
    year, price, days, number = (
        draw.randint(1950, 2025),
        draw.randint(3, 900),
        draw.randint(2, 90),
        draw.randint(10, 999),
    )
    passage = draw.choice(
        [
            f"The {product} was designed by {person} in {year} and is made in {town}. It costs {price} euros.",
            f"{town} opened its {product} works in {year}. {person} leads the {number} people who work there.",
            f"Orders of the {product} can be returned within {days} days. Write to {person} in {town} about it.",
        ]
    )
    about = {
        "designed": [
            (f"Who designed the {product}?", f"{person} designed the {product}."),
            (f"How much does the {product} cost?", f"The {product} costs {price} euros."),
            (f"Where is the {product} made?", f"The {product} is made in {town}."),
            (f"When was the {product} designed?", f"The {product} was designed in {year}."),
        ],
        "opened": [
            (f"Who leads the {product} works?", f"{person} leads the {product} works in {town}."),
            (f"How many people work at the {product} works?", f"{number} people work there."),
            (f"When did the {product} works open?", f"The {product} works opened in {year}."),
        ],
        "returned": [
            (f"How long can I return a {product}?", f"You can return it within {days} days."),
            (f"Whom do I ask about returning my {product}?", f"Write to {person} in {town}."),
        ],
    }
    choices = next(questions for word, questions in about.items() if word in passage)
    return product, passage, *draw.choice(choices)


def make_demonstrations(num_rows: int, seed: int) -> list[Row]:
    """Return different conversations, the same ones for the same arguments."""
    draw = random.Random(seed)
    writers, weights = zip(*KINDS, strict=True)
    rows: dict[str, Row] = {}
    while len(rows) < num_rows:
        row = draw.choices(writers, weights)[0](draw).to_row()
        rows.setdefault(json.dumps(row["messages"]), row)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write demonstrations of an assistant.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows = make_demonstrations(given.rows, given.seed)
    given.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} conversations in {given.out}")


if __name__ == "__main__":
    main()
