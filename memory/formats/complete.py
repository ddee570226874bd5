"""This project's own form, which holds all of an example: what is written in it is read as it was."""

from __future__ import annotations

from typing import Any

from memory.formats.content import BadRow, ExampleContent, ExampleKind, Row
from memory.formats.messages import left_over, read_messages, read_replies, read_tools

FIELDS = ("kind", "prompt", "completion", "rejected", "is_good", "reward", "tools", "task")


def recognise(row: Row) -> str | None:
    """Return why a row is in this form; None where it is not."""
    has_kind = isinstance(row.get("kind"), str) and row["kind"] in set(ExampleKind)
    return "it has 'kind' and 'completion'" if has_kind and "completion" in row else None


def read(row: Row) -> ExampleContent:
    """Return the example of a row. Raises: BadRow."""
    kinds = [kind.value for kind in ExampleKind]
    if row.get("kind") not in kinds:
        raise BadRow(f"'kind' is {row.get('kind')!r}: use one of {', '.join(kinds)}")
    kind = ExampleKind(row["kind"])
    is_good, reward, task = row.get("is_good"), row.get("reward"), row.get("task")
    if (kind is ExampleKind.LABEL) != isinstance(is_good, bool):
        raise BadRow(f"'is_good' is {is_good!r}: a label has true or false there, no other kind has it")
    if reward is not None and (isinstance(reward, bool) or not isinstance(reward, int | float) or not 0 <= reward <= 1):
        raise BadRow(f"'reward' is {reward!r}: it is a number from 0 to 1")
    prompt = row.get("prompt")
    if not prompt and kind is not ExampleKind.DEMONSTRATION:
        raise BadRow(f"'prompt' is missing: a {kind.value} needs one")
    has_rejected = kind is ExampleKind.PREFERENCE
    return ExampleContent(
        kind,
        read_replies(row.get("completion"), "completion"),
        prompt=read_messages(prompt, "prompt") if prompt else [],
        rejected=read_replies(row.get("rejected"), "rejected") if has_rejected else [],
        is_good=is_good,
        reward=None if reward is None else float(reward),
        tools=read_tools(row.get("tools")),
        task=None if task is None else str(task),
        extra=left_over(row, *FIELDS),
    )


def write(content: ExampleContent) -> Row:
    """Return the row of an example; empty fields are left out."""
    fields: dict[str, Any] = {name: getattr(content, name) for name in FIELDS}
    fields["kind"] = content.kind.value
    return {**{name: value for name, value in fields.items() if value not in (None, [])}, **content.extra}
