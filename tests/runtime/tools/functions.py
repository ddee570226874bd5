"""A function that tests make a tool of, with all that a schema can take from one."""

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
