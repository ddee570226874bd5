"""The ids of answers. An episode gives one answer per turn, and each id leads to the episode's trajectory.

    trj_0199...        the trajectory, and its first answer
    trj_0199....3      the answer whose first step has position 3
    resp_0199..._3     the same, in the Responses API
    msg_0199..._3      the same, in Anthropic's Messages API

Hazard: an id is only parsed here; whether it exists is for the caller to look up.
"""

from __future__ import annotations

import re

# Ids are stored in rows and kept by clients: their forms can be added to, never changed.
_PREFIXED = re.compile(r"(?:resp|msg)_([0-9a-f]+)_(\d+)")
_LATER_ANSWER = re.compile(r"(trj_[0-9a-f]+)\.(\d+)")


def name_answer(trajectory_id: str, first_position: int) -> str:
    """Return the id of the chat completion whose first step has this position."""
    return f"{trajectory_id}.{first_position}" if first_position else trajectory_id


def name_response(trajectory_id: str, first_position: int) -> str:
    """Return the id of the response whose first step has this position."""
    return f"resp_{trajectory_id.removeprefix('trj_')}_{first_position}"


def name_message(trajectory_id: str, first_position: int) -> str:
    """Return the id of the message, in Anthropic's API, whose first step has this position."""
    return f"msg_{trajectory_id.removeprefix('trj_')}_{first_position}"


def trajectory_of(answer_id: str) -> str:
    """Return the id of an answer's trajectory; any other text unchanged, so that the look-up names it in its error."""
    if match := _PREFIXED.fullmatch(answer_id):
        return f"trj_{match[1]}"
    match = _LATER_ANSWER.fullmatch(answer_id)
    return match[1] if match else answer_id


def start_of(answer_id: str) -> int | None:
    """Return the position of an answer's first step; None for the id of a trajectory, which means all of it."""
    match = _PREFIXED.fullmatch(answer_id) or _LATER_ANSWER.fullmatch(answer_id)
    return int(match[2]) if match else None
