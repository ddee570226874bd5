"""Escapes control characters in data before it is printed to a terminal.

Stored text may come from anyone, and terminals execute escape sequences, which move the cursor, overwrite output or set
the clipboard. Invariant: only line feeds and tabs pass.
"""

from __future__ import annotations

import re
from typing import TypeVar, cast

Json = TypeVar("Json")

# C0, DEL and C1 control characters without \t and \n, Unicode's bidirectional controls, which reorder text, and its
# line and paragraph separators. Zero-width joiners stay: emoji and several scripts need them.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(value: Json) -> Json:
    r"""Return text with its control characters escaped (`\x1b`); also inside of lists and mappings."""
    return cast(Json, _escape_within(value))


def _escape_within(value: object) -> object:
    if isinstance(value, str):
        return CONTROLS.sub(_escape, value.replace("\r\n", "\n"))
    if isinstance(value, dict):
        return {_escape_within(key): _escape_within(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape_within(item) for item in value]
    return value


def printable_json(text: str) -> str:
    r"""Return equivalent JSON in which every control character is escaped (`\u009b`)."""
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
