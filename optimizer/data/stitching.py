"""Joins the model calls of one role in a trajectory into token rows, and takes the memory segment out of their prompts.

Output tokens are never rendered again: they are the ones the engine sampled. A chat template may write an earlier reply
a little differently into the next prompt than it was sampled (whitespace around a tool call, JSON separators, removed
reasoning). The captured prompt is then not continued by force: the call becomes a row of its own, and what the
template wrote is context.

Invariant: `mask[i] == 1` exactly where `input_ids[i]` was sampled by the policy in the context that precedes it; over
the rows of one trajectory every output token is trained exactly once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from memory.conversation import show_memory
from memory.schema import Step, StepKind, Trajectory

RERENDER_MISMATCH = "rerender_mismatch"
"""The reason for which the memory segment could not be taken out of a prompt, or put into it."""


class AddedToken(Protocol):
    """A token that was added to a tokenizer's vocabulary."""

    content: str
    special: bool


class Tokenizer(Protocol):
    """The parts of a transformers tokenizer that rows need."""

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def added_tokens_encoder(self) -> dict[str, int]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]: ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool,
        tokenize: bool,
    ) -> str: ...

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, list[int]]: ...


@dataclass(frozen=True)
class Row:
    """Tokens of consecutive model calls as the engine saw them; `mask` is 1 on the agent's own tokens, else 0."""

    input_ids: list[int]
    mask: list[int]
    starts: list[int]
    """Where the output of each model step of this row begins."""
    num_prompt_tokens: int
    """Length of the first prompt, before the first output."""
    first_step: int = 0
    """Number of the trajectory's model step that comes first in this row."""

    @property
    def last_step(self) -> int:
        return self.first_step + len(self.starts) - 1

    def start_of(self, step: int) -> int:
        """Return where the output of the trajectory's model step number `step` begins."""
        return self.starts[step - self.first_step]


@dataclass(frozen=True)
class SegmentEdit:
    """The tokens of a memory segment with one neighbour on either side, and the tokens that replace them."""

    shown: list[int]
    bare: list[int]
    first: int = field(compare=False)
    """Where both begin in the rendered prompts."""


class Unstitchable(ValueError):
    """A trajectory cannot become a row; the message is the reason it is counted under."""


def stitch(steps: Sequence[Step]) -> tuple[list[Row], Counter[str]]:
    """Join the model calls of one role in one trajectory into rows; return them and the number of joints by their kind.

    clean: the row so far is the beginning of the next prompt, and the row goes on. fork: it is not, and the next call
    begins a new row with its own captured prompt.

    Raises:
        Unstitchable: a model step has no token ids, or there is no model step.
    """
    rows: list[Row] = []
    joints: Counter[str] = Counter()
    for position, step in enumerate(step for step in steps if step.kind is StepKind.MODEL):
        prompt, output = step.prompt_token_ids, step.output_token_ids
        # the engine returns ids only where it is asked for them; text that is rendered again would train other tokens
        if not prompt or not output:
            raise Unstitchable("no_token_ids")
        row_so_far = rows[-1].input_ids if rows else []
        # token by token: equal text may be tokenized differently
        is_clean = bool(rows) and prompt[: len(row_so_far)] == row_so_far
        if rows:
            joints["clean" if is_clean else "fork"] += 1
        if is_clean:
            rows[-1] = _continue_row(rows[-1], prompt, output)
        else:
            mask = [0] * len(prompt) + [1] * len(output)
            rows.append(Row([*prompt, *output], mask, [len(prompt)], len(prompt), position))
    if not rows:
        raise Unstitchable("no_model_steps")
    return rows, joints


def align_logprobs(row: Row, steps: Sequence[Step]) -> list[float] | None:
    """Return the log-prob with which each token of a row was sampled, 0 where it is not the policy's own; None where a
    step has none. `steps` are those that `row` was stitched from."""
    aligned = [0.0] * len(row.input_ids)
    model_steps = [step for step in steps if step.kind is StepKind.MODEL]
    for start, step in zip(row.starts, model_steps[row.first_step : row.last_step + 1], strict=True):
        if step.output_logprobs is None:
            return None
        aligned[start : start + len(step.output_logprobs)] = step.output_logprobs
    return aligned


def _continue_row(row: Row, prompt: Sequence[int], output: Sequence[int]) -> Row:
    # not negative: the row so far is the beginning of the prompt
    num_new = len(prompt) - len(row.input_ids)
    return replace(
        row,
        input_ids=[*prompt, *output],
        mask=row.mask + [0] * num_new + [1] * len(output),
        starts=[*row.starts, len(prompt)],
    )


def plan_memory_removal(trajectory: Trajectory, tokenizer: Tokenizer) -> list[SegmentEdit]:
    """Return the edits that take the memory segment out of a prompt of `trajectory`; empty where no memory was shown.

    There is one for each way in which the engine may have written the message; at most one of them fits.
    """
    shown = show_memory(trajectory.opening, trajectory.memory_text)
    if shown == list(trajectory.opening):
        return []
    edits: list[SegmentEdit] = []
    for joins_parts in (True, False) if _has_parts(shown) else (True,):
        try:
            with_segment, without = (
                render_prompt(tokenizer, messages, trajectory.tools, joins_parts=joins_parts)
                for messages in (shown, trajectory.opening)
            )
        except TypeError:  # a template that adds texts together takes no parts
            continue
        edit = _find_edit(with_segment, without)
        # a template may drop the message that holds the segment
        if edit not in edits and with_segment != without:
            edits.append(edit)
    return edits


def _find_edit(shown: list[int], bare: list[int]) -> SegmentEdit:
    """Return the stretch in which two renderings differ, with one common token on either side.

    Tokens at its edges that the segment changes by merging with its neighbours lie inside it, so that a prompt that
    holds the whole stretch reads, once it is replaced, as the tokenizer would have written it.
    """
    before = count_common_prefix(shown, bare)
    longest = min(len(shown), len(bare)) - before  # the common end must not overlap the common beginning
    after = min(longest, count_common_prefix(shown[::-1], bare[::-1]))
    first, last = max(0, before - 1), max(0, after - 1)
    return SegmentEdit(shown[first : len(shown) - last], bare[first : len(bare) - last], first)


def count_common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the longest common beginning."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    return next(i for i in range(length) if left[i] != right[i])


def remove_memory(row: Row, edits: Sequence[SegmentEdit]) -> Row:
    """Return `row` with the memory segment taken out of its first prompt (context distillation, arXiv 2510.01375).

    Everything else of the prompt stays as it was captured. Prompts of later calls hold the segment as well, and it is
    found there by its tokens.

    Raises:
        Unstitchable: `rerender_mismatch`, when the prompt does not hold the segment as it renders, or holds it twice.
    """
    if not edits:
        return row
    prompt = row.input_ids[: row.num_prompt_tokens]
    # searched in the first prompt alone: behind it lie sampled tokens, which must stay
    matches = [(edit, start) for edit in edits for start in _find_all(prompt, edit.shown)]
    # twice means that a user quoted the segment: removing one of them is a guess
    if len(matches) != 1:
        raise Unstitchable(RERENDER_MISMATCH)
    ((edit, first),) = matches
    return _replace_in_prompt(row, first, first + len(edit.shown), edit.bare)


def insert_memory(row: Row, trajectory: Trajectory, memory_text: str, tokenizer: Tokenizer) -> Row:
    """Return `row` with a memory segment in its first prompt, as if it had been shown to `trajectory`.

    Raises:
        Unstitchable: `rerender_mismatch`, when the prompt does not begin as the opening renders, or the template shows
            no segment.
    """
    with_segment, without = (
        render_prompt(tokenizer, messages, trajectory.tools)
        for messages in (show_memory(trajectory.opening, memory_text), trajectory.opening)
    )
    edit = _find_edit(with_segment, without)
    # up to and with the token behind the segment: a later call's prompt goes on differently
    end = edit.first + len(edit.bare)
    if with_segment == without or row.input_ids[: row.num_prompt_tokens][:end] != without[:end]:
        raise Unstitchable(RERENDER_MISMATCH)
    return _replace_in_prompt(row, edit.first, end, edit.shown)


def _replace_in_prompt(row: Row, first: int, end: int, tokens: list[int]) -> Row:
    """Return `row` with other tokens from `first` up to `end`, all within its first prompt."""
    shift = len(tokens) - (end - first)
    return replace(
        row,
        input_ids=row.input_ids[:first] + tokens + row.input_ids[end:],
        mask=row.mask[:first] + [0] * len(tokens) + row.mask[end:],
        # all three move together: mask and starts are positions in input_ids
        starts=[start + shift for start in row.starts],
        num_prompt_tokens=row.num_prompt_tokens + shift,
    )


def _find_all(tokens: list[int], wanted: list[int]) -> list[int]:
    return [
        start
        for start in range(len(tokens) - len(wanted) + 1)
        if tokens[start] == wanted[0] and tokens[start : start + len(wanted)] == wanted
    ]


def render_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    *,
    joins_parts: bool = True,
) -> list[int]:
    """Return the token ids that the engine makes of `messages`: its normal form first, then the chat template.

    `joins_parts`: a message of several text parts becomes one text, as the engine does for templates that take no
    parts.
    """
    text = render_text(tokenizer, messages, tools, add_generation_prompt=True, joins_parts=joins_parts)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render_text(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    *,
    add_generation_prompt: bool,
    joins_parts: bool = True,
) -> str:
    """Return the text that the chat template makes of messages in the engine's normal form."""
    served_tools: dict[str, Any] = {"tools": [_as_served_tool(tool) for tool in tools]} if tools else {}
    return tokenizer.apply_chat_template(
        [_as_served_message(message, joins_parts) for message in messages],
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
        **served_tools,
    )


def _has_parts(messages: Sequence[dict[str, Any]]) -> bool:
    return any(isinstance(message.get("content"), list) for message in messages)


def _as_served_message(message: dict[str, Any], joins_parts: bool) -> dict[str, Any]:
    if joins_parts and isinstance(message.get("content"), list):
        # the separator is vLLM's; with another one no captured prompt would hold the rendered segment
        message = {**message, "content": "\n".join(part.get("text", "") for part in message["content"])}
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
