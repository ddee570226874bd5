"""Reads a task file: checks every row before any is taken, and keeps where each row stands instead of the rows.

Flow: file -> index (name, position, split, kind, digest) -> a row when its task starts. Memory use is the index's: some
hundred bytes a task, whatever its size.
Invariants: a file with a bad row gives no task at all. A name means one content for ever: the digests of all names
that were ever taken are kept beside the data (`TaskNames`), and a row with a known name and other content is refused,
because rewards, demonstrations and held-out comparisons of the old content stand under that name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from memory.conversation import last_user_text
from memory.held_out import normalize_text
from memory.storage.whole_files import write_whole
from runtime.environments.graders.base import GradingResources
from runtime.environments.machines.machine import require_machines
from runtime.environments.task_files.rows import SPLITS, TaskRow, digest_content
from runtime.errors import EnvironmentRefused, TaskChanged

MAX_PROBLEMS = 20
"""Problems that one message lists; the others are counted."""
MAX_PROBLEM_CHARS = 500


@dataclass(frozen=True, slots=True)
class RowPosition:
    """Where a row stands in its file, and what is known of it without reading it."""

    offset: int
    num_bytes: int
    line: int
    split: str
    kind: str
    digest: str


@dataclass
class TaskIndex:
    """All rows of a file by name, in the file's order."""

    path: Path
    positions: dict[str, RowPosition] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    """Names by split."""
    asking: dict[bytes, list[str]] = field(default_factory=dict)
    """Digest of a question -> the names of the tasks that ask it."""

    def add(self, row: TaskRow, position: RowPosition) -> None:
        self.positions[row.name] = position
        self.names[position.split].append(row.name)
        self.asking.setdefault(_digest_question(last_user_text(row.opening)), []).append(row.name)

    def find_tasks(self, question: str) -> Sequence[str]:
        """Return the names of the tasks that ask this."""
        return self.asking.get(_digest_question(question), ()) if question.strip() else ()


def index_task_file(path: Path, resources: GradingResources, known: Mapping[str, str] | None = None) -> TaskIndex:
    """Return the index of a file all of whose rows are valid. Blocks; about 10 seconds for 100 MB.

    `known`: digests of the names that were taken before.

    Raises:
        EnvironmentRefused: the file is missing, or rows are invalid; the message names each by file and line.
    """
    index, problems = TaskIndex(path), list[str]()
    for line, offset, text in _read_lines(path):
        try:
            row, content = parse_row(text)
            _require_gradable(row, resources)
            position = RowPosition(offset, len(text), line, row.final_split, row.kind, digest_content(content))
            _require_same_task(row.name, position, index, known or {})
        except ValueError as error:
            problems.append(f"{path}:{line}: {describe_error(error)}")
            continue
        if not problems:  # afterwards the file is refused, and only its other problems matter
            index.add(row, position)
        else:
            index.positions.setdefault(row.name, position)
    if problems:
        shown = "\n".join(problems[:MAX_PROBLEMS])
        more = f"\nand {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise EnvironmentRefused(f"{len(problems)} rows are invalid, so no task was taken:\n{shown}{more}")
    if not index.positions:
        raise EnvironmentRefused(f"{path} has no row: write one task a line")
    return index


def read_row(path: Path, position: RowPosition) -> TaskRow:
    """Return one row of an indexed file.

    Raises:
        TaskChanged: the file holds something else there now.
    """
    try:
        with path.open("rb") as file:
            file.seek(position.offset)
            row, content = parse_row(file.read(position.num_bytes))
    except (OSError, ValueError) as error:
        raise TaskChanged(f"{path}:{position.line} cannot be read any more: {describe_error(error)}") from None
    if digest_content(content) != position.digest:
        raise TaskChanged(f"{path}:{position.line} has changed since the server read it: restart the server")
    return row


def parse_row(text: bytes) -> tuple[TaskRow, dict[str, Any]]:
    """Return a line's row and its content as it stands there. Raises: ValueError, for `describe_error` to describe."""
    try:
        content = json.loads(text.decode("utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a row is a JSON object, not {type(content).__name__}")
        return TaskRow.model_validate(content), content
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


class TaskNames:
    """The digests of all task names of one environment that were ever taken, in a file of the data directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, str]:
        """Return digests by name. Raises: EnvironmentRefused if the file is damaged."""
        if not self._path.exists():
            return {}
        try:
            return json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EnvironmentRefused(
                f"{self._path} is damaged ({error}): restore it from a backup, or remove it if no task of the "
                "environment was ever changed"
            ) from None

    def add(self, index: TaskIndex) -> None:
        """Add the names of an index."""
        known = self.read()
        added = {name: position.digest for name, position in index.positions.items() if name not in known}
        if not added:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(known | added))


def _read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line number, offset, text) of every line that is not blank."""
    try:
        with path.open("rb") as file:
            offset = 0
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield number, offset, text
                offset += len(text)
    except OSError as error:
        raise EnvironmentRefused(f"the task file {str(path)!r} cannot be read: {error.strerror}") from None


def _digest_question(text: str) -> bytes:
    return hashlib.sha256(normalize_text(text).encode("utf-8", "surrogatepass")).digest()[:16]


def _require_gradable(row: TaskRow, resources: GradingResources) -> None:
    try:
        if row.machine is not None:
            require_machines()
        row.grader.check(row.definitions, resources, has_database=row.database is not None)
    except ValueError as error:
        raise ValueError(f"task {row.name!r}: {error}") from None


def _require_same_task(name: str, position: RowPosition, index: TaskIndex, known: Mapping[str, str]) -> None:
    if name in index.positions:
        raise ValueError(f"task {name!r} stands in line {index.positions[name].line} already: names are unique")
    if known.get(name, position.digest) != position.digest:
        raise ValueError(
            f"task {name!r} was another task when it was first taken: a name means one task for ever, so give the new "
            "one a new name, or restore the old content"
        )


def describe_error(error: Exception) -> str:
    """Return an error in one line, with the key inside of the row and the value that is wrong there."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())[:MAX_PROBLEM_CHARS]
    parts = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        value = repr(problem["input"])
        shown = value if len(value) <= 80 else f"{value[:80]}..."
        message = problem["msg"].removeprefix("Value error, ")
        parts.append(f"{key}: {message} ({shown})" if key else message)
    return "; ".join(parts)[:MAX_PROBLEM_CHARS]
