"""How much a JSON body may hold, found out piece by piece while it arrives, before anything of it is parsed.

A parser keeps the interpreter to itself until it is done: what it is given must be small enough for that to be short.
Invariant: what comes through is no deeper and holds no more values than it may.
"""

from __future__ import annotations

import itertools
import re

from runtime.api.errors import BadRequest, TooLarge
from runtime.config import LimitsConfig

END = b"\x00"
"""Put behind each piece. JSON never holds it, and in UTF-16 and UTF-32, which could hide a bracket, every body does."""
# Possessive: linear also on what is made to be slow. A string that goes on in the next piece leaves END a second time.
A_STRING = re.compile(rb'"[^"\\\x00]*+(?:\\[^\x00][^"\\\x00]*+)*+(?:"|(\\?+\x00))', re.DOTALL)
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class JsonShape:
    """What has been seen of a body: how deep it is nested by now, and how many values it holds."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._depth = 0
        self._num_values = 1
        self._open_string = b""
        """What to put before the next piece, so that it begins inside of a string again."""

    def feed(self, piece: bytes) -> None:
        """Take the next piece.

        Raises:
            BadRequest: the body is deeper than it may be, or is no UTF-8.
            TooLarge: it holds more values.
        """
        if END in piece:
            raise BadRequest("the body is not JSON in UTF-8: it holds a zero byte", code="malformed_json")
        outside = A_STRING.sub(rb"\1\1", self._open_string + piece + END)
        is_cut = outside.endswith((b"\x00\x00", b"\x00\\\x00"))
        self._open_string = b'"' + outside[-2:-1].replace(END, b"") if is_cut else b""
        self._num_values += outside.count(b",") + outside.count(b"[") + outside.count(b"{")
        if self._num_values > self._limits.max_json_values:
            raise TooLarge(
                f"the body holds more than {self._limits.max_json_values} values: send fewer at once",
                code="too_many_values",
            )
        brackets = outside.translate(None, NO_BRACKETS)
        depths = list(itertools.accumulate((STEPS[bracket] for bracket in brackets), initial=self._depth))
        self._depth = depths[-1]
        if max(depths) > self._limits.max_json_depth:
            raise BadRequest(
                f"the body is nested deeper than {self._limits.max_json_depth} levels: flatten it",
                code="nested_too_deeply",
            )
