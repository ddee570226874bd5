"""How practice is divided into rounds."""

from __future__ import annotations

import math


def plan_rounds(num_episodes: int, num_tasks: int) -> list[int]:
    """Return how many tasks each round plays; only the last may be shorter."""
    num_rounds = math.ceil(num_episodes / num_tasks)
    return [min(num_tasks, num_episodes - number * num_tasks) for number in range(num_rounds)]
