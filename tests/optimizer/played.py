"""A held-out episode as the gate reads it, for tests that change only its outcome."""

from __future__ import annotations

from optimizer.evaluation.cells import HeldOutEpisode

EPISODE = HeldOutEpisode(
    task="",
    trajectory_id="",
    is_success=False,
    is_broken=False,
    is_truncated=False,
    num_calls=8,
    prompt_tokens=2000,
    output_tokens=100,
    num_invalid_tool_calls=0,
    num_calling_tools=7,
)
