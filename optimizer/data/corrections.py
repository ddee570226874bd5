"""Turns a correction into a row to imitate: the prompt as the engine saw it, then the better reply as the policy would
have written it.

The tokens before the reply are the engine's own and are not rendered again. Only the reply is rendered, by the policy's
own chat template, and only where the result ends like a reply the policy ends itself.
Invariant: the text of a correction stays text. A special token of the chat in it, which would end the reply and begin
another speaker's message, leaves the row out.
"""

from __future__ import annotations

from memory.records.feedback import Correction
from optimizer.data.stitching import Row, Tokenizer, Unstitchable

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
    before = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    messages = [*QUESTION, {"role": "assistant", "content": text}]
    after = tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
    # some templates open a thought in the generation prompt that a finished reply lacks
    if not after.startswith(before):
        raise Unstitchable("correction_not_rendered")
    # the template has written all special tokens: one that the tokenizer adds, such as BOS, would stand in the middle
    # of the row
    ids = list(tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id not in ids:
        raise Unstitchable("correction_not_rendered")
    # up to and with the last end token; templates add a newline behind it
    reply = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
    # the end token itself is the last one
    if set(reply[:-1]) & set(tokenizer.added_tokens_encoder.values()):
        raise Unstitchable("correction_with_marks")
    return reply
