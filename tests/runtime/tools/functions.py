"""A function that tests turn into a tool, with every feature that a schema reads."""

from __future__ import annotations

from typing import Literal


def find_train(origin: str, seats: int = 1, comfort: Literal["plain", "quiet"] = "plain") -> dict[str, object]:
    """Find the next train.

    Args:
        origin: where to board,
            by its full name
        seats: how many
    """
    return {"from": origin, "seats": seats, "comfort": comfort}
