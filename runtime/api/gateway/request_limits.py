"""Checks the depth and the number of values of a JSON body piece by piece while it arrives, before it is parsed.

A JSON parser holds the interpreter's lock until it is done; bounded input bounds the pause of all other requests.
Invariant: a body that passes has no more levels and no more values than the limits allow.
"""

from __future__ import annotations

import itertools
import re

from runtime.api.errors import BadRequest, TooLarge
from runtime.config import LimitsConfig

END = b"\x00"
"""Appended to each piece. No JSON in UTF-8 contains it; every JSON in UTF-16 or UTF-32 does, and those could hide a
bracket inside of a wide character."""
# Possessive quantifiers keep the match linear on hostile input. A string that continues in the next piece matches with
# END as its last byte, which the substitution doubles: that is how `check` recognizes it.
STRING = re.compile(rb'"[^"\\\x00]*+(?:\\[^\x00][^"\\\x00]*+)*+(?:"|(\\?+\x00))', re.DOTALL)
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class JsonShapeCheck:
    """The nesting depth and the number of values of the pieces checked so far."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._depth = 0
        self._num_values = 1
        self._open_string = b""
        """Prefix for the next piece: a quote if the last piece ended in a string, with a backslash that ended it."""

    def check(self, piece: bytes) -> None:
        """Check the next piece.

        Raises:
            BadRequest: the body is nested too deeply, or is not UTF-8.
            TooLarge: it has too many values.
        """
        if END in piece:
            raise BadRequest("the body is not JSON in UTF-8: it holds a zero byte", code="malformed_json")
        outside = STRING.sub(rb"\1\1", self._open_string + piece + END)
        is_cut = outside.endswith((b"\x00\x00", b"\x00\\\x00"))
        self._open_string = b'"' + outside[-2:-1].replace(END, b"") if is_cut else b""
        # An upper bound: an empty list counts as holding a value.
        self._num_values += outside.count(b",") + outside.count(b"[") + outside.count(b"{")
        if self._num_values > self._limits.max_json_values:
            raise TooLarge(
                f"the body holds more than {self._limits.max_json_values} values: send fewer at once",
                code="too_many_values",
            )
        brackets = outside.translate(None, NO_BRACKETS)
        # At most one entry for a byte of the piece, so STEP_BYTES (request_body.py) bounds it.
        depths = list(itertools.accumulate((STEPS[bracket] for bracket in brackets), initial=self._depth))
        self._depth = depths[-1]
        if max(depths) > self._limits.max_json_depth:
            raise BadRequest(
                f"the body is nested deeper than {self._limits.max_json_depth} levels: flatten it",
                code="nested_too_deeply",
            )
