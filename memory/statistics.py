"""Statistics that both the runtime and the optimizer report."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson_interval(num_successes: int, num_tries: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the two-sided score interval for a share, (low, high) in [0, 1]; (0, 1) without tries.

    Wilson, 1927: "Probable inference, the law of succession, and statistical inference".
    """
    if num_tries == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = num_successes / num_tries
    spread = z * math.sqrt(share * (1 - share) / num_tries + z * z / (4 * num_tries**2))
    scale = 1 + z * z / num_tries
    centre = share + z * z / (2 * num_tries)
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
