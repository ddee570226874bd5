"""tau-bench's trajectories: OpenAI messages with a task and a reward. Its tools are not in the file."""

from __future__ import annotations

from memory.formats.content import BadRow, ExampleContent, ExampleKind, Row
from memory.formats.messages import left_over, read_messages, require_kind, require_trained


def recognise(row: Row) -> str | None:
    """Return why a row is in this form; None where it is not."""
    return "it has 'traj' and 'reward'" if isinstance(row.get("traj"), list) and "reward" in row else None


def read(row: Row) -> ExampleContent:
    """Return the demonstration of a trajectory, with its reward. Raises: BadRow."""
    reward = row.get("reward")
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not 0 <= reward <= 1:
        raise BadRow(f"'reward' is {reward!r}: it is a number from 0 to 1")
    messages = read_messages(row.get("traj"), "traj")
    require_trained(messages, "traj")
    task = row.get("task_id")
    return ExampleContent(
        ExampleKind.DEMONSTRATION,
        messages,
        reward=float(reward),
        task=None if task is None else str(task),
        extra=left_over(row, "traj", "reward", "task_id"),
    )


def write(content: ExampleContent) -> Row:
    """Return the row of a demonstration; one without a reward counts as a success. Raises: NotExpressible."""
    require_kind(content, ExampleKind.DEMONSTRATION)
    task = content.task
    return {
        "task_id": int(task) if task is not None and task.isdecimal() else task,
        "reward": 1.0 if content.reward is None else content.reward,
        "traj": content.messages,
        **content.extra,
    }
