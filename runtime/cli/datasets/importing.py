"""Validates files of training data line by line, then sends them to the server in batches.

Invariant: all files are validated before the first row is sent, so that with `stop` an invalid line leaves nothing half
imported. Sending rows again has no effect, so an import that broke off is run again as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from memory.formats.content import BadRow, Row
from memory.formats.files import FileRow, dump_line, read_file
from memory.formats.registry import AUTO, Format, find_format, recognise_rows
from runtime.cli.client import Client, ErrorReply, ServerUnreachable
from runtime.cli.output import BAD_USAGE, Failure

MAX_SHOWN_ERRORS = 20
RECOGNISED_ROWS = 20
"""How many rows must be in one format for it to be that of the file."""
MAX_BATCH_ROWS = 500
MAX_BATCH_BYTES = 2**20
MAX_BATCH_VALUES = 50_000
"""Commas and brackets; the server's limit, `server.limits.max_json_values`, is twice as high."""


@dataclass(frozen=True)
class ImportRequest:
    """The options of an import."""

    files: Sequence[Path]
    format: str
    environment: str
    source: str | None
    skips_errors: bool
    is_untrusted: bool


@dataclass
class CheckedFile:
    """A file whose lines have been validated."""

    path: Path
    format: Format | None
    """None for a file without rows."""
    reason: str
    num_rows: int = 0
    """Valid and invalid ones."""
    num_invalid: int = 0
    errors: list[str] = field(default_factory=list)
    """The first ones, as `file:line: what is wrong`."""

    def to_json(self) -> dict[str, Any]:
        return {
            "file": str(self.path),
            "format": self.format.name if self.format else None,
            "reason": self.reason,
            "num_rows": self.num_rows,
            "num_invalid": self.num_invalid,
            "errors": self.errors,
        }

    def note(self, number: int, error: str) -> None:
        """Count an invalid line."""
        self.num_invalid += 1
        if len(self.errors) < MAX_SHOWN_ERRORS:
            self.errors.append(f"{self.path}:{number}: {error}")


def check_files(request: ImportRequest, progress: Progress) -> list[CheckedFile]:
    """Validate every line of every file.

    Raises: Failure for a file that cannot be read or recognised, and, unless errors are skipped, for an invalid line.
    """
    checked = [_check_file(path, request, progress) for path in request.files]
    if not request.skips_errors and any(each.num_invalid for each in checked):
        errors = [error for each in checked for error in each.errors]
        num_invalid = sum(each.num_invalid for each in checked)
        more = f"\n... and {num_invalid - len(errors)} more" if num_invalid > len(errors) else ""
        raise Failure(
            "\n".join(errors) + f"{more}\nnothing was imported: mend these lines, or leave them out with "
            "--on-error skip",
            exit_code=BAD_USAGE,
            code="invalid_row",
            errors=errors,
            num_invalid=num_invalid,
        )
    return checked


def _check_file(path: Path, request: ImportRequest, progress: Progress) -> CheckedFile:
    try:
        format_, reason = _choose_format(path, request.format)
        checked = CheckedFile(path, format_, reason)
        bar = progress.add_task(f"checking {path.name}", total=path.stat().st_size)
        for each in read_file(path):
            checked.num_rows += 1
            progress.update(bar, completed=each.position)
            try:
                _read(each, format_)
            except BadRow as error:
                checked.note(each.number, str(error))
    except OSError as error:
        raise Failure(f"cannot read {str(path)!r}: {error.strerror or error}", exit_code=BAD_USAGE) from None
    return checked


def _choose_format(path: Path, name: str) -> tuple[Format | None, str]:
    """Return the format of a file, and why it is that one."""
    if name != AUTO:
        return find_format(name), "named"
    rows = [each.row for each in islice(read_file(path), RECOGNISED_ROWS) if each.row is not None]
    if not rows:
        return None, "no row"
    try:
        return recognise_rows(rows)
    except BadRow as error:
        raise Failure(f"{path}: {error}", exit_code=BAD_USAGE, code="unknown_format") from None


def _read(each: FileRow, format_: Format | None) -> Row:
    """Return a valid row. Raises: BadRow."""
    if each.row is None or format_ is None:
        raise BadRow(each.error or "the row is in no format")
    format_.read(each.row)
    return each.row


async def send_files(
    client: Client, request: ImportRequest, checked: Sequence[CheckedFile], progress: Progress
) -> dict[str, Any]:
    """Send the valid rows of all files; return the counts of each file and their sums.

    Raises: ErrorReply, ServerUnreachable; Failure, which says how many rows are stored, if some are.
    """
    stored = Counter[str]()
    try:
        files = [await _send_file(client, request, each, progress, stored) for each in checked]
    except (ErrorReply, ServerUnreachable) as error:
        num_stored = stored["num_added"] + stored["num_known"]
        if not num_stored:
            raise
        num_valid = sum(each.num_rows - each.num_invalid for each in checked)
        body: dict[str, Any] = error.body if isinstance(error, ErrorReply) else {"code": "no_server"}
        raise Failure(
            f"{error}\n{num_stored} of {num_valid} rows are stored, and perhaps some of the last request: run the same "
            "command again, and it skips them",
            **body,
            num_stored=num_stored,
        ) from None
    names = ("num_rows", "num_added", "num_known", "num_raised", "num_invalid")
    return {"object": "import", "files": files, **{name: sum(each[name] for each in files) for name in names}}


async def _send_file(
    client: Client, request: ImportRequest, checked: CheckedFile, progress: Progress, stored: Counter[str]
) -> dict[str, Any]:
    """Send a file's valid rows; return its counts, and add them to `stored` with each request."""
    counts = {"num_added": 0, "num_known": 0, "num_raised": 0}
    teaches: bool | None = None
    if checked.format is not None:
        bar = progress.add_task(f"sending {checked.path.name}", total=checked.path.stat().st_size)
        query = {
            "format": checked.format.name,
            "environment": request.environment,
            "source": request.source if request.source is not None else checked.path.name,
            "is_trusted": not request.is_untrusted,
        }
        for batch in _make_batches(checked, progress, bar):
            added = await client.post_lines("/v1/examples", batch, **query)
            for name in counts:
                counts[name] += added[name]
                stored[name] += added[name]
            teaches = added["teaches"]
    # None for a file without a valid row
    return {**checked.to_json(), **counts, "teaches": teaches}


def _make_batches(checked: CheckedFile, progress: Progress, bar: TaskID) -> Iterator[bytes]:
    """Yield the valid rows of a file, as many at once as a request may hold."""
    batch: list[bytes] = []
    num_bytes = num_values = 0
    for each in read_file(checked.path):
        try:
            row = _read(each, checked.format)
        except BadRow:
            continue
        line = dump_line(row)
        values = sum(line.count(mark) for mark in (b",", b"[", b"{"))
        is_full = len(batch) == MAX_BATCH_ROWS or num_bytes + len(line) > MAX_BATCH_BYTES
        if batch and (is_full or num_values + values > MAX_BATCH_VALUES):
            yield b"".join(batch)
            batch, num_bytes, num_values = [], 0, 0
            # only now: what is yielded has been sent when this goes on
            progress.update(bar, completed=each.position)
        batch.append(line)
        num_bytes, num_values = num_bytes + len(line), num_values + values
    if batch:
        yield b"".join(batch)
