"""Turns a correction into a row to imitate: the prompt as the engine saw it, then the better reply as the policy
would have written it.

Refuses to render what came before the reply: those tokens are the engine's own. Only the reply is rendered, by the
policy's own template, and only where that ends like a turn the policy ends itself.
Invariant: words of a correction are words: a mark of the chat in them, which would end the reply and speak as somebody
else, leaves the row out.
"""

from __future__ import annotations

from typing import Any

from memory.records.feedback import Correction
from optimizer.data.stitching import Row, Unstitchable

ASKED = [{"role": "user", "content": "?"}]
"""Whatever stands before a reply: templates write a plain one the same after anything."""


def stitch_correction(correction: Correction, tokenizer: Any) -> Row:
    """Return the row; its mask is 1 on the better reply.

    Raises:
        Unstitchable: the reply was recorded without token ids, or the correction cannot be rendered.
    """
    prompt = correction.step.prompt_token_ids
    if not prompt:
        raise Unstitchable("no_token_ids")
    reply = render_reply(tokenizer, correction.text)
    return Row([*prompt, *reply], [0] * len(prompt) + [1] * len(reply), [len(prompt)], len(prompt))


def render_reply(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of `text` as a reply, up to the token that ends it.

    Raises:
        Unstitchable: `correction_not_rendered` or `correction_with_marks`.
    """
    before = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
    said = [*ASKED, {"role": "assistant", "content": text}]
    after = tokenizer.apply_chat_template(said, add_generation_prompt=False, tokenize=False)
    if not after.startswith(before):
        raise Unstitchable("correction_not_rendered")
    ids = list(tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id not in ids:
        raise Unstitchable("correction_not_rendered")
    reply = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
    if set(reply[:-1]) & set(tokenizer.added_tokens_encoder.values()):
        raise Unstitchable("correction_with_marks")
    return reply
