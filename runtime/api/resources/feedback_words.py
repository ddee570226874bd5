"""Words that mean a reward: `thumbs_up` and its like, in the spellings that chat interfaces and gateways send."""

from __future__ import annotations

from typing import Any

REWARD_WORDS: dict[str, bool] = {
    **dict.fromkeys(("thumbs_up", "up", "like", "good", "positive", "yes", "true", "\N{THUMBS UP SIGN}"), True),
    **dict.fromkeys(
        ("thumbs_down", "down", "dislike", "bad", "negative", "no", "false", "\N{THUMBS DOWN SIGN}"), False
    ),
}


def read_reward(value: Any) -> bool | int | float | None:
    """Return the reward that a posted value stands for.

    Raises:
        ValueError: a text that is none of the words. Kept as it is, it would look like a reward and count as nothing.
    """
    if not isinstance(value, str):
        return value
    word = value.strip().lower().replace("-", "_").replace(" ", "_")
    if word not in REWARD_WORDS:
        allowed = ", ".join(repr(known) for known in REWARD_WORDS if known.isascii())
        raise ValueError(
            f"the reward {value[:80]!r} is not understood: give true, false, a number from 0 to 1, or one of {allowed};"
            " a category needs a `name` of its own, and a text belongs in `comment`"
        )
    return REWARD_WORDS[word]
