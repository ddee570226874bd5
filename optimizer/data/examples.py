"""Renders imported examples into rows: text becomes the token ids that the policy's chat template and tokenizer make.

Each reply is rendered as a model call of its own, the prompt as the engine would see it and the reply as the policy
would write it, and the calls are stitched like those of an episode. Rows and masks therefore have one form, wherever
the text came from.
Invariant: the text of an example stays text. In prompts, special tokens of the chat are broken as the runtime breaks
them; a reply with one leaves the example out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2

from memory.chat_marks import A_TAG, OWN_TAGS, ChatMarks
from memory.datasets.examples import TaughtExample
from memory.formats.content import Message, is_trained
from memory.schema import Step, StepKind
from optimizer.data.corrections import render_reply_after
from optimizer.data.stitching import Row, Tokenizer, Unstitchable, render_prompt, stitch

NOT_RENDERED = "example_not_rendered"
WITH_MARKS = "example_with_marks"


class ExampleRenderer:
    """Renders examples with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, max_length_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_length_tokens = max_length_tokens
        tokens = tokenizer.added_tokens_decoder.values()
        # as the runtime reads them from the tokenizer's files (memory/chat_marks.py)
        tags = {token.content for token in tokens if not token.special and A_TAG.fullmatch(token.content)}
        self._marks = ChatMarks((token.content for token in tokens if token.special), tags - OWN_TAGS)

    def render(self, example: TaughtExample) -> list[Row]:
        """Return the rows of a demonstration or a label; every token of its replies is trained in exactly one of them.

        Raises:
            Unstitchable: it cannot be rendered, or a row is too long.
        """
        row = example.example
        return self._render(row.prompt, row.completion, row.tools)

    def render_pair(self, example: TaughtExample) -> tuple[Row, Row]:
        """Return the rows of both sides of a preference, which have the same prompt.

        Raises:
            Unstitchable: it cannot be rendered, a row is too long, or the sides do not answer one prompt.
        """
        chosen = self._render_side(example, example.example.completion)
        rejected = self._render_side(example, example.example.rejected)
        start = chosen.starts[0]
        if start != rejected.starts[0] or chosen.input_ids[:start] != rejected.input_ids[:start]:
            raise Unstitchable("prompts_differ")
        if chosen.input_ids == rejected.input_ids:
            raise Unstitchable("no_contrast")
        return chosen, rejected

    def _render_side(self, example: TaughtExample, completion: Sequence[Message]) -> Row:
        return self._render(example.example.prompt, completion, example.example.tools)[0]

    def _render(
        self, prompt: Sequence[Message], completion: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> list[Row]:
        cleaned = self._clean([*prompt, *completion])
        cleaned_tools = self._marks.clean(list(tools))
        calls: list[Step] = []
        for position, message in enumerate(completion, start=len(prompt)):
            if not is_trained(message) or not (message["content"] or message.get("tool_calls")):
                continue
            if cleaned[position] != _bare(message):
                raise Unstitchable(WITH_MARKS)
            prompt_ids, reply_ids = self._render_call(cleaned[:position], cleaned[position], cleaned_tools)
            # at once: every call renders all that came before it, so a long conversation costs its square
            if len(prompt_ids) + len(reply_ids) > self._max_length_tokens:
                raise Unstitchable("too_long")
            calls.append(
                Step(
                    trajectory_id="",
                    position=len(calls),
                    kind=StepKind.MODEL,
                    prompt_token_ids=prompt_ids,
                    output_token_ids=reply_ids,
                )
            )
        rows, _ = stitch(calls)
        return rows

    def _render_call(
        self, before: list[Message], reply: Message, tools: list[dict[str, Any]]
    ) -> tuple[list[int], list[int]]:
        """Return the token ids of the prompt and of the reply."""
        try:
            prompt_ids = render_prompt(self._tokenizer, before, tools)
            return prompt_ids, render_reply_after(self._tokenizer, before, reply, tools)
        # a template raises for a conversation that it does not allow: roles that do not alternate, several calls
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise Unstitchable(NOT_RENDERED) from error

    def _clean(self, messages: Iterable[Message]) -> list[Message]:
        return self._marks.clean_messages(map(_bare, messages))


def render_examples(
    examples: Sequence[TaughtExample], tokenizer: Tokenizer, max_length_tokens: int, counts: Counter[str]
) -> list[tuple[TaughtExample, list[Row]]]:
    """Return each demonstration or label with its rows; the others are counted by reason. Equal rows count once."""
    if not examples:
        return []
    renderer = ExampleRenderer(tokenizer, max_length_tokens)
    taken: dict[tuple[object, ...], tuple[TaughtExample, list[Row]]] = {}
    for each in examples:
        try:
            rows = renderer.render(each)
            # two tenants may import one file
            key = (each.example.is_good, *(tuple(row.input_ids) for row in rows))
            if key in taken:
                raise Unstitchable("duplicate")
        except Unstitchable as reason:
            counts[str(reason)] += 1
            continue
        taken[key] = each, rows
    return list(taken.values())


def _bare(message: Message) -> Message:
    """Return a message without what no template reads."""
    return {key: value for key, value in message.items() if key != "weight"}
