"""Forms of one instruction and one output: SMART-Trajectory, Alpaca, and question and answer (GSM8K).

A long trajectory of SMART holds what its retriever found between the agent's own texts. That part becomes a user's
message, as in ReAct, so that it is shown and not trained. SMART's marks (`</eoi>`, `<|Locator|>`) stay in the texts.
"""

from __future__ import annotations

import re

from memory.formats.content import BadRow, ExampleContent, ExampleKind, Message, NotExpressible, Row
from memory.formats.messages import left_over, require_kind, require_text, split_question, text_of_turn

FOUND = re.compile(r"\s*(<retrieval>.*?</retrieval>)\s*", re.DOTALL)
SEPARATOR = "\n\n"
"""Between the parts of a long trajectory."""


def recognise_smart(row: Row) -> str | None:
    """Return why a row is SMART's; None where it is not."""
    has_all = all(isinstance(row.get(field), str) for field in ("dataset_name", "instruction", "output"))
    return "it has 'dataset_name', 'instruction' and 'output'" if has_all else None


def recognise_alpaca(row: Row) -> str | None:
    """Return why a row is Alpaca's; None where it is not."""
    is_alpaca = "instruction" in row and "output" in row and "dataset_name" not in row
    return "it has 'instruction' and 'output'" if is_alpaca else None


def recognise_answer(row: Row) -> str | None:
    """Return why a row is a question with its answer; None where it is not."""
    return "it has 'question' and 'answer'" if "question" in row and "answer" in row else None


def read_smart(row: Row) -> ExampleContent:
    """Return the demonstration of a long or short trajectory. Raises: BadRow."""
    content = read_alpaca(row)
    parts = FOUND.split(require_text(row, "output"))
    replies = [
        {"role": "user" if number % 2 else "assistant", "content": part} for number, part in enumerate(parts) if part
    ]
    if not any(reply["role"] == "assistant" for reply in replies):
        raise BadRow("'output' holds nothing but what was retrieved: there is no reply to learn from")
    return ExampleContent(
        ExampleKind.DEMONSTRATION, replies, prompt=content.prompt, extra=left_over(row, "instruction", "output")
    )


def read_alpaca(row: Row) -> ExampleContent:
    """Return the demonstration of an instruction, with its input if it has one, and an output. Raises: BadRow."""
    instruction, output = require_text(row, "instruction"), require_text(row, "output")
    given = row.get("input") or ""
    if not isinstance(given, str):
        raise BadRow(f"'input' must be a text, not {type(given).__name__}")
    if not instruction or not output:
        raise BadRow("'instruction' and 'output' must not be empty")
    asked = f"{instruction}\n{given}" if given else instruction
    # `input` is kept beside, for writing: it cannot be told from the instruction any more
    extra = left_over(row, "instruction", "output")
    return ExampleContent(ExampleKind.DEMONSTRATION, [_say(output)], prompt=[_ask(asked)], extra=extra)


def read_answer(row: Row) -> ExampleContent:
    """Return the demonstration of a question and its answer. Raises: BadRow."""
    question, answer = require_text(row, "question"), require_text(row, "answer")
    if not question or not answer:
        raise BadRow("'question' and 'answer' must not be empty")
    extra = left_over(row, "question", "answer")
    return ExampleContent(ExampleKind.DEMONSTRATION, [_say(answer)], prompt=[_ask(question)], extra=extra)


def write_smart(content: ExampleContent) -> Row:
    """Return a row of SMART's. Raises: NotExpressible."""
    require_kind(content, ExampleKind.DEMONSTRATION)
    prompt, replies = split_question(content)
    for number, message in enumerate(replies):
        role = "user" if FOUND.fullmatch(message["content"]) else "assistant"
        if message["role"] != role or message.keys() != {"role", "content"} or (number == 0 and role == "user"):
            raise NotExpressible("a conversation that is not one trajectory of texts")
    output = SEPARATOR.join(message["content"] for message in replies)
    extra = {"id": "", "dataset_name": "", **content.extra}
    return {**extra, **_split_input(content, text_of_turn(prompt, "user")), "output": output}


def write_alpaca(content: ExampleContent) -> Row:
    """Return a row of Alpaca's. Raises: NotExpressible."""
    require_kind(content, ExampleKind.DEMONSTRATION)
    _require_no_tools(content)
    prompt, replies = split_question(content)
    asked, output = text_of_turn(prompt, "user"), text_of_turn(replies, "assistant")
    return {**content.extra, **_split_input(content, asked), "output": output}


def write_answer(content: ExampleContent) -> Row:
    """Return a row with a question and an answer. Raises: NotExpressible."""
    require_kind(content, ExampleKind.DEMONSTRATION)
    _require_no_tools(content)
    prompt, replies = split_question(content)
    return {"question": text_of_turn(prompt, "user"), "answer": text_of_turn(replies, "assistant"), **content.extra}


def _split_input(content: ExampleContent, asked: str) -> Row:
    given = content.extra.get("input") or ""
    return {"instruction": asked.removesuffix(f"\n{given}") if given else asked, "input": given}


def _require_no_tools(content: ExampleContent) -> None:
    if content.tools:
        raise NotExpressible("a conversation with tools")


def _ask(text: str) -> Message:
    return {"role": "user", "content": text}


def _say(text: str) -> Message:
    return {"role": "assistant", "content": text}
