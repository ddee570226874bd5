"""TRL's forms: `messages` with `tools`; `prompt` with `completion`, with a `label`, or with `chosen` and `rejected`.

Departure from TRL: a text is a message here too, a prompt a user's and a completion an assistant's, because every row
is rendered by the policy's chat template.
"""

from __future__ import annotations

from memory.formats import complete, openai
from memory.formats.content import BadRow, ExampleContent, ExampleKind, Message, Row
from memory.formats.messages import as_object_arguments, left_over, read_replies, read_tools, read_turns, require_kind

FIELDS = ("prompt", "completion", "chosen", "rejected", "label", "messages", "tools")


def recognise(row: Row) -> str | None:
    """Return why a row is in one of these forms; None where it is not."""
    if _is_sharegpt(row) or "conversations" in row or "instruction" in row or complete.recognise(row):
        return None
    if "chosen" in row and "rejected" in row:
        return "it has 'chosen' and 'rejected'"
    if "prompt" in row and "completion" in row:
        return "it has 'prompt' and 'completion'" + (" and 'label'" if "label" in row else "")
    if isinstance(row.get("messages"), list) and not openai.OTHER_FIELDS - {"label"} & row.keys():
        if "label" in row:
            return "it has 'messages' and 'label'"
        if openai.has_object_arguments(row):
            return "it has 'messages', and tool calls whose arguments are objects"
    return None


def _is_sharegpt(row: Row) -> bool:
    turns = row.get("chosen")
    first = turns[0] if isinstance(turns, list) and turns else turns
    return isinstance(first, dict) and "from" in first


def read(row: Row) -> ExampleContent:
    """Return the example of a row. Raises: BadRow."""
    if "chosen" in row:
        return _read_pair(row)
    if "label" in row:
        return _read_label(row)
    if "prompt" not in row:
        return openai.read_conversation(row)
    return ExampleContent(
        ExampleKind.DEMONSTRATION,
        read_replies(row.get("completion"), "completion"),
        prompt=read_turns(row.get("prompt"), "prompt"),
        tools=read_tools(row.get("tools")),
        extra=left_over(row, *FIELDS),
    )


def _read_pair(row: Row) -> ExampleContent:
    chosen, rejected = (read_replies(row.get(field), field) for field in ("chosen", "rejected"))
    if "prompt" in row:
        prompt = read_turns(row["prompt"], "prompt")
        chosen, rejected = _drop_repeated_prompt(prompt, chosen, rejected)
    else:  # an implicit prompt: what both begin with
        length = next(
            (position for position, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
            min(len(chosen), len(rejected)),
        )
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
        if not prompt or not chosen or not rejected:
            raise BadRow("'chosen' and 'rejected' must begin alike and then differ, or there must be a 'prompt'")
    return ExampleContent(
        ExampleKind.PREFERENCE,
        chosen,
        prompt=prompt,
        rejected=rejected,
        tools=read_tools(row.get("tools")),
        extra=left_over(row, *FIELDS),
    )


def _drop_repeated_prompt(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message]]:
    """Return both sides without the prompt, which some files repeat in each. Raises: BadRow if a side has no more."""
    if chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not chosen or not rejected:
        raise BadRow("'chosen' and 'rejected' need a message behind the prompt")
    return chosen, rejected


def _read_label(row: Row) -> ExampleContent:
    label = row["label"]
    # 0 and 1 are equal to False and True, and files have both
    if label not in (True, False):
        raise BadRow(f"'label' is {label!r}: use true for a good completion and false for a bad one")
    if "messages" in row:
        messages = read_replies(row["messages"], "messages")
        prompt, completion = messages[:-1], messages[-1:]
        if completion[0]["role"] != "assistant" or not prompt:
            raise BadRow("'messages' must end with the assistant's message that 'label' speaks of, behind a prompt")
    else:
        prompt, completion = read_turns(row.get("prompt"), "prompt"), read_replies(row.get("completion"), "completion")
    return ExampleContent(
        ExampleKind.LABEL,
        completion,
        prompt=prompt,
        is_good=bool(label),
        tools=read_tools(row.get("tools")),
        extra=left_over(row, *FIELDS),
    )


def write(content: ExampleContent) -> Row:
    """Return the row of an example."""
    prompt, completion, rejected = map(as_object_arguments, (content.prompt, content.completion, content.rejected))
    rest = {**({"tools": content.tools} if content.tools else {}), **content.extra}
    if content.kind is ExampleKind.PREFERENCE:
        return {"prompt": prompt, "chosen": completion, "rejected": rejected, **rest}
    if content.kind is ExampleKind.LABEL:
        return {"prompt": prompt, "completion": completion, "label": content.is_good, **rest}
    if prompt:
        return {"prompt": prompt, "completion": completion, **rest}
    return {"messages": completion, **rest}


def recognise_instruction(row: Row) -> str | None:
    """Return why a row is an instruction with a chosen and a rejected trajectory; None where it is not."""
    has_all = all(field in row for field in ("instruction", "chosen", "rejected"))
    return "it has 'instruction', 'chosen' and 'rejected'" if has_all else None


def read_instruction(row: Row) -> ExampleContent:
    """Return the preference of an instruction with two trajectories (arXiv 2503.12434). Raises: BadRow."""
    prompt = read_turns(row.get("instruction"), "instruction")
    chosen, rejected = (read_replies(row.get(field), field) for field in ("chosen", "rejected"))
    chosen, rejected = _drop_repeated_prompt(prompt, chosen, rejected)
    extra = left_over(row, "instruction", "chosen", "rejected", "tools")
    return ExampleContent(
        ExampleKind.PREFERENCE,
        chosen,
        prompt=prompt,
        rejected=rejected,
        tools=read_tools(row.get("tools")),
        extra=extra,
    )


def write_instruction(content: ExampleContent) -> Row:
    """Return the row of a preference. Raises: NotExpressible."""
    require_kind(content, ExampleKind.PREFERENCE)
    is_text = len(content.prompt) == 1 and content.prompt[0].keys() == {"role", "content"}
    instruction = content.prompt[0]["content"] if is_text and content.prompt[0]["role"] == "user" else content.prompt
    tools = {"tools": content.tools} if content.tools else {}
    return {
        "instruction": instruction,
        "chosen": content.completion,
        "rejected": content.rejected,
        **tools,
        **content.extra,
    }
