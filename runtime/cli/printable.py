"""Makes text from data harmless to a terminal: control characters are shown, not obeyed.

Stored text may come from anybody, and a terminal obeys escape sequences: they move the cursor, rewrite what was
printed, set the clipboard. Only line ends and tabs pass.
"""

from __future__ import annotations

import re
from typing import Any

# C0, DEL and C1 control characters without \t and \n; then what reorders text (Unicode's bidirectional controls) and
# what ends a line beside \n. Joiners stay: emoji and several scripts need them.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(value: Any) -> Any:
    r"""Return text with its control characters written out (`\x1b`), and the same of lists and mappings of it."""
    if isinstance(value, str):
        return CONTROLS.sub(_write_out, value.replace("\r\n", "\n"))
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [printable(item) for item in value]
    return value


def printable_json(text: str) -> str:
    r"""Return JSON of the same meaning in which every control character is escaped (`\u009b`)."""
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _write_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
