"""Stitches the model calls of one trajectory into token rows, and takes the memory segment out of them.

Refuses to re-render what was said: every output token is the one the engine sampled. Only the first prompt is ever
rendered again, twice (with and without the memory segment), and only when the first rendering equals what was captured.

Flow: steps -> `stitch` -> rows -> `remove_memory` -> rows as if nothing had been shown.
Invariant: `mask[i] == 1` exactly where `input_ids[i]` was sampled by the policy in the context that precedes it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from memory.schema import Step, StepKind, Trajectory


@dataclass(frozen=True)
class Row:
    """Tokens of one conversation as the engine saw them; `mask` is 1 on the agent's own tokens, else 0."""

    input_ids: list[int]
    mask: list[int]
    starts: list[int]
    """Where the output of each model step of this row begins."""
    num_prompt_tokens: int
    """Length of the first prompt, before the first output."""


class Unstitchable(ValueError):
    """A trajectory cannot become a row; the message is the word it is counted under."""


def stitch(steps: Sequence[Step]) -> tuple[list[Row], Counter[str]]:
    """Join the model calls of one trajectory into rows, and count how each joint went.

    clean: what we hold is the beginning of the next prompt. realign: they part inside the last reply (a parsed tool
    call was rendered back a little differently), so the drifted tail becomes context. fork: they part earlier, so a
    new row begins.

    Raises:
        Unstitchable: a model step has no token ids.
    """
    rows: list[Row] = []
    tally: Counter[str] = Counter()
    ids: list[int] = []
    mask: list[int] = []
    starts: list[int] = []
    num_prompt_tokens = 0
    for step in (step for step in steps if step.kind is StepKind.MODEL):
        prompt, output = step.prompt_token_ids, step.output_token_ids
        if not prompt or not output:
            raise Unstitchable("no_token_ids")
        if starts:
            num_common = count_common_prefix(ids, prompt)
            joint = "clean" if num_common == len(ids) else "realign" if num_common >= starts[-1] else "fork"
            tally[joint] += 1
            if joint == "fork":
                rows.append(Row(ids, mask, starts, num_prompt_tokens))
                ids, mask, starts = [], [], []
            else:
                ids, mask = ids[:num_common], mask[:num_common]
        if not starts:
            num_prompt_tokens = len(prompt)
        mask = mask + [0] * (len(prompt) - len(ids)) + [1] * len(output)
        ids = list(prompt) + list(output)
        starts = [*starts, len(prompt)]
    if not starts:
        raise Unstitchable("no_model_steps")
    rows.append(Row(ids, mask, starts, num_prompt_tokens))
    return rows, tally


def count_common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the longest common beginning."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    return next(i for i in range(length) if left[i] != right[i])


def remove_memory(row: Row, trajectory: Trajectory, tokenizer: Any) -> Row:
    """Return `row` with the memory segment taken out of its first prompt (context distillation, arXiv 2510.01375).

    Raises:
        Unstitchable: `rerender_mismatch`, when the rendering with the segment is not what the engine saw.
    """
    if not trajectory.memory_text:
        return row
    shown = render_prompt(tokenizer, show_memory(trajectory.opening, trajectory.memory_text), trajectory.tools)
    if row.input_ids[: len(shown)] != shown:
        raise Unstitchable("rerender_mismatch")
    unshown = render_prompt(tokenizer, trajectory.opening, trajectory.tools)
    shift = len(unshown) - len(shown)
    return replace(
        row,
        input_ids=unshown + row.input_ids[len(shown) :],
        mask=[0] * len(unshown) + row.mask[len(shown) :],
        starts=[start + shift for start in row.starts],
        num_prompt_tokens=row.num_prompt_tokens + shift,
    )


def show_memory(opening: Sequence[dict[str, Any]], memory_text: str) -> list[dict[str, Any]]:
    """Return the opening as the model saw it: the memory segment before the last user message."""
    messages = list(opening)
    for position in reversed(range(len(messages))):
        if messages[position].get("role") == "user":
            content = messages[position].get("content") or ""
            messages[position] = {**messages[position], "content": f"{memory_text}\n\n{content}"}
            return messages
    raise Unstitchable("no_user_message")


def render_prompt(tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[int]:
    """Return the token ids that the engine makes of `messages`: its normal form first, then the chat template."""
    text = tokenizer.apply_chat_template(
        [_as_served_message(message) for message in messages],
        tools=[_as_served_tool(tool) for tool in tools] or None,
        add_generation_prompt=True,
        tokenize=False,
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _as_served_message(message: dict[str, Any]) -> dict[str, Any]:
    # vLLM turns string arguments into objects before the template sees them; the template would quote them twice
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json.loads(function["arguments"] or "{}")
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def _as_served_tool(tool: dict[str, Any]) -> dict[str, Any]:
    # the order and the keys in which vLLM hands a tool definition to the template; templates print it as JSON
    function = tool["function"]
    served = {key: function.get(key) for key in ("name", "description", "parameters")}
    if function.get("strict") is not None:
        served["strict"] = function["strict"]
    return {"type": "function", "function": served}
