"""Names from outside: their type, and the only way to build a path from them.

A name is up to 64 letters, digits, '.', '_' and '-', and begins with a letter or a digit. So it is a single, visible
component of a path, and never an option of a command.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""A component of a path: a name with a suffix, as in `<name>-v<version>`."""


def check_name(name: str) -> str:
    """Return `name` if it is valid. Raises: ValueError."""
    # fullmatch: `$` would let a newline at the end through
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name[:80]!r} is not a name: a name is up to 64 letters, digits, '.', '_' and '-', and begins with a "
            "letter or a digit"
        )
    return name


def check_name_or_empty(name: str) -> str:
    """Return `name` if it is valid or empty. Raises: ValueError."""
    return check_name(name) if name else name


Name = Annotated[str, AfterValidator(check_name)]
NameOrEmpty = Annotated[str, AfterValidator(check_name_or_empty)]


def path_below(directory: Path, *parts: str) -> Path:
    """Return the path of these components below `directory`.

    Raises: ValueError for a component that is not a name, and for a link that leads out of the directory.
    """
    for part in parts:
        if not _PART.fullmatch(part):
            raise ValueError(f"{part[:160]!r} cannot be part of a path below {str(directory)!r}: it is not a name")
    path = directory.joinpath(*parts)
    # After resolving links: a directory below may be a link to elsewhere.
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ValueError(f"{str(path)!r} leads out of {str(directory)!r}: remove the link")
    return path
