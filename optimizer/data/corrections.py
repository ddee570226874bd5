"""Turns a correction into a row to imitate: the prompt as the engine saw it, then the better reply as the policy would
have written it.

The tokens before the reply are the engine's own and are not rendered again. Only the reply is rendered, by the policy's
own chat template, and only where the result ends like a reply the policy ends itself.
Invariant: the text of a correction stays text. A special token of the chat in it, which would end the reply and begin
another speaker's message, leaves the row out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memory.records.feedback import Correction
from optimizer.data.stitching import Row, Tokenizer, Unstitchable, render_text

QUESTION = [{"role": "user", "content": "?"}]
"""Any message may precede a reply: templates write a plain reply the same after each."""


def stitch_correction(correction: Correction, tokenizer: Tokenizer) -> Row:
    """Return the row; its mask is 1 on the better reply.

    Raises:
        Unstitchable: the reply was recorded without token ids, or the correction cannot be rendered.
    """
    prompt = correction.step.prompt_token_ids
    if not prompt:
        raise Unstitchable("no_token_ids")
    reply = render_reply(tokenizer, correction.text)
    return Row([*prompt, *reply], [0] * len(prompt) + [1] * len(reply), [len(prompt)], len(prompt))


def render_reply(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of `text` as a reply, up to the token that ends it.

    Raises:
        Unstitchable: `correction_not_rendered` or `correction_with_marks`.
    """
    try:
        reply = render_reply_after(tokenizer, QUESTION, {"role": "assistant", "content": text})
    except ValueError:
        raise Unstitchable("correction_not_rendered") from None
    # the end token itself is the last one
    if set(reply[:-1]) & set(tokenizer.added_tokens_encoder.values()):
        raise Unstitchable("correction_with_marks")
    return reply


def render_reply_after(
    tokenizer: Tokenizer,
    before: Sequence[dict[str, Any]],
    reply: dict[str, Any],
    tools: Sequence[dict[str, Any]] = (),
) -> list[int]:
    """Return the token ids of a reply to the messages before it, up to the token that ends it.

    Raises:
        ValueError: the template writes the reply, or the end of it, in another way than a model would.
    """
    prompt = render_text(tokenizer, before, tools, add_generation_prompt=True)
    whole = render_text(tokenizer, [*before, reply], tools, add_generation_prompt=False)
    # some templates open a thought in the generation prompt that a finished reply lacks
    if not whole.startswith(prompt):
        raise ValueError("the rendered reply does not continue its prompt")
    # the template has written all special tokens: one that the tokenizer adds, such as BOS, would stand in the middle
    # of the row
    ids = list(tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id not in ids:
        raise ValueError("the rendered reply has no end")
    # up to and with the last end token; templates add a newline behind it
    return ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
