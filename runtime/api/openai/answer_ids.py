"""The names of answers. An episode may give several, one for each time its client comes back; each leads to its record.

    trj_0199...        the trajectory, and its first answer
    trj_0199....3      the answer that begins at its step 3
    resp_0199..._3     the same, as the Responses API has it

Refuses to know whether any of them exists: a name is taken apart, nothing is looked up.
"""

from __future__ import annotations

import re

_RESPONSE = re.compile(r"resp_([0-9a-f]+)_(\d+)")
_LATER_ANSWER = re.compile(r"(trj_[0-9a-f]+)\.(\d+)")


def name_answer(trajectory_id: str, first_position: int) -> str:
    """Return the id of the chat completion that begins at this step."""
    return f"{trajectory_id}.{first_position}" if first_position else trajectory_id


def name_response(trajectory_id: str, first_position: int) -> str:
    """Return the id of the response that begins at this step."""
    return f"resp_{trajectory_id.removeprefix('trj_')}_{first_position}"


def trajectory_of(answer_id: str) -> str:
    """Return the id of the trajectory that an answer belongs to; anything else as it is, to be refused by its name."""
    if match := _RESPONSE.fullmatch(answer_id):
        return f"trj_{match[1]}"
    match = _LATER_ANSWER.fullmatch(answer_id)
    return match[1] if match else answer_id


def start_of(answer_id: str) -> int | None:
    """Return the step at which an answer begins; None for the id of a trajectory, which means the whole of it."""
    match = _RESPONSE.fullmatch(answer_id) or _LATER_ANSWER.fullmatch(answer_id)
    return int(match[2]) if match else None
