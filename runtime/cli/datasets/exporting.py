"""Writes a streamed export to a file, and goes on where an earlier run stopped.

While it runs, rows are in FILE.part, and FILE.part.json says up to which cursor and byte they are whole. At the end the
part is renamed. Invariant: a file that bears its own name is complete.
"""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from memory.formats.files import dump_line
from memory.storage.whole_files import write_whole
from runtime.cli.client import Client, ServerUnreachable
from runtime.cli.output import BAD_USAGE, Failure

ROWS_PER_CHECKPOINT = 2_000


@dataclass(frozen=True)
class ExportRequest:
    """The options of an export."""

    content: str
    format: str
    environment: str | None
    episodes: bool
    imported: bool
    url: str


@dataclass
class Checkpoint:
    """How far an export has come."""

    request: dict[str, Any]
    cursor: str = ""
    num_bytes: int = 0
    num_rows: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows that the format cannot hold, by reason."""


class PartialFile:
    """The file of an unfinished export, with its checkpoint."""

    def __init__(self, out: Path, request: ExportRequest) -> None:
        """Open the part of an earlier run, or begin one. Raises: Failure."""
        self.out = out
        self.part = out.with_name(f"{out.name}.part")
        self._note = out.with_name(f"{out.name}.part.json")
        if out.exists():
            raise Failure(f"{str(out)!r} exists: remove it, or write to another file", exit_code=BAD_USAGE)
        self.checkpoint = Checkpoint(asdict(request))
        try:
            if self._note.exists():
                self.checkpoint = self._read_checkpoint(asdict(request))
            self._file = self.part.open("r+b" if self.part.exists() else "w+b")
            # rows behind the checkpoint may be torn, and are sent again
            self._file.truncate(self.checkpoint.num_bytes)
            self._file.seek(self.checkpoint.num_bytes)
        except OSError as error:
            raise Failure(f"cannot write {str(self.part)!r}: {error.strerror}", exit_code=BAD_USAGE) from None

    def _read_checkpoint(self, request: dict[str, Any]) -> Checkpoint:
        checkpoint = Checkpoint(**json.loads(self._note.read_text(encoding="utf-8")))
        is_whole = self.part.exists() and self.part.stat().st_size >= checkpoint.num_bytes
        if checkpoint.request != request or not is_whole:
            raise Failure(
                f"{str(self.part)!r} is the beginning of another export: remove it and {self._note.name!r}, or write "
                "to another file",
                exit_code=BAD_USAGE,
            )
        return checkpoint

    def add(self, lines: Sequence[bytes], cursor: str, left_out: Mapping[str, int]) -> None:
        """Write rows, and note that all rows up to `cursor` are there but those `left_out`."""
        data = b"".join(lines)
        # members of gzip behind each other are one file, so that each checkpoint ends a member
        self._file.write(gzip.compress(data, mtime=0) if self.out.suffix == ".gz" and data else data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.checkpoint.cursor = cursor
        self.checkpoint.num_bytes = self._file.tell()
        self.checkpoint.num_rows += len(lines)
        self.checkpoint.left_out = dict(Counter(self.checkpoint.left_out) + Counter(left_out))
        write_whole(self._note, json.dumps(asdict(self.checkpoint)))

    def finish(self) -> None:
        """Give the file its name."""
        self._file.close()
        self.part.replace(self.out)
        self._note.unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()


async def export_to_file(client: Client, request: ExportRequest, out: Path, progress: Progress) -> dict[str, Any]:
    """Export to a file; return what it holds. Raises: Failure, ErrorReply, ServerUnreachable."""
    file = PartialFile(out, request)
    try:
        await _receive(client, request, file, progress)
    finally:
        file.close()
    file.finish()
    counts = {"num_rows": file.checkpoint.num_rows, "left_out": file.checkpoint.left_out}
    return {"object": "export", "file": str(out), **counts}


async def _receive(client: Client, request: ExportRequest, file: PartialFile, progress: Progress) -> None:
    """Write all rows that are streamed, and count those that were left out."""
    bar = progress.add_task(f"exporting {request.content}", total=None)
    lines, left_out = list[bytes](), Counter[str]()
    cursor = file.checkpoint.cursor
    stream = client.stream_lines(
        f"/v1/export/{request.content}",
        format=request.format,
        environment=request.environment,
        episodes=request.episodes,
        imported=request.imported,
        after=cursor,
        cursors=True,
    )
    async for event in stream:
        if "total" in event:
            progress.update(bar, total=event["total"])
        elif "cursor" in event:
            lines += map(dump_line, event["rows"])
            left_out.update(event["left_out"])
            cursor = event["cursor"]
            progress.advance(bar)
            if len(lines) >= ROWS_PER_CHECKPOINT:
                file.add(lines, cursor, left_out)
                lines, left_out = [], Counter()
        else:
            file.add(lines, cursor, left_out)
            return
    raise ServerUnreachable(
        f"the export broke off after {file.checkpoint.num_rows} rows: run the same command again, and it goes on there"
    )
