"""The grader of numbers, and how a number is read out of a reply.

The answer in a reply is the number behind the last `####` (GSM8K, arXiv 2110.14168), else the one in the last
`\\boxed{}` (MATH, arXiv 2103.03874), else the last number of the text. Numbers may carry a currency, thousands
separators, a percent sign or units, and may be fractions: `$1,234.50`, `\\frac{3}{4}`, `3/4`, `2 1/2`, `12 %`.
Invariant: values are exact fractions; only `tolerance` makes a comparison inexact.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

from pydantic import Field, field_validator

from runtime.environments.base import Outcome
from runtime.environments.graders.base import Grader, GradingResources, Submission, quote, right, wrong

MAX_DIGITS = 400
"""Of one number; longer ones are not read, because arithmetic with them takes long."""
_SIGN = r"[-+\u2212]?\s*"
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?"
_NUMBER = re.compile(
    rf"""
    (?<![\w)])  # not inside of a word (B2B), and a minus behind a number is no sign (5-10)
    (?: (?P<sign>[-+\u2212]) \s* )? (?: [$€£¥] \s* )?
    (?:
        (?:(?P<whole>\d+)\s*)? \\[dt]?frac \s* (?: \{{ \s* (?P<top>{_SIGN}{_DECIMAL}) \s* \}} | (?P<top_digit>\d) )
            \s* (?: \{{ \s* (?P<bottom>{_DECIMAL}) \s* \}} | (?P<bottom_digit>\d) )
      | (?:(?P<mixed>\d{{1,3}}(?:,\d{{3}})+|\d+)[ \t]+)? (?P<over>{_DECIMAL}) \s* / \s* (?P<under>{_DECIMAL})
      | (?P<decimal>{_DECIMAL})
    )
    (?P<percent> \s* \\?% )?
    """,
    re.VERBOSE,
)


class Numeric(Grader):
    """The number of the reply equals the answer."""

    type: Literal["numeric"]
    answer: int | float | str
    """A number, or a text that holds one as a reply would: `"#### 42"`, `"3/4"`."""
    tolerance: float = Field(default=0.0, ge=0)
    """Largest absolute difference."""

    @field_validator("answer", mode="before")
    @classmethod
    def _holds_a_number(cls, answer: object) -> object:
        if isinstance(answer, bool) or find_number(str(answer)) is None:
            raise ValueError(f"{answer!r} holds no number")
        return answer

    async def grade(self, submission: Submission, resources: GradingResources) -> Outcome:
        expected, given = find_number(str(self.answer)), find_number(submission.text)
        assert expected is not None, "checked when the row was read"
        if given is None:
            return wrong(f"no number in {quote(submission.text)}")
        # "50 %" for 50 and for 0.5: whether a percent sign is a unit or a factor, the text does not say.
        if any(abs(left - right_) <= Fraction(self.tolerance) for left in given for right_ in expected):
            return right(f"the number is {quote(str(self.answer))}")
        return wrong(f"expected {quote(self.answer)}, not {float_or_text(given[0])}")


def find_number(text: str) -> tuple[Fraction, ...] | None:
    """Return the readings of the number that a reply gives as its answer; None if there is no number.

    A number with a percent sign has two readings, 50 and 1/2.
    """
    for part, takes_first in _answer_parts(text):
        matches = _NUMBER.finditer(part.replace("{,}", ","))
        readings = [reading for match in matches if (reading := _read(match)) is not None]
        if readings:
            return readings[0] if takes_first else readings[-1]
    return None


def _answer_parts(text: str) -> list[tuple[str, bool]]:
    """Return the parts of a text to look for its answer in, the surest first, and whether its first number counts."""
    parts: list[tuple[str, bool]] = []
    if "####" in text:
        parts.append((text.rsplit("####", 1)[1].strip().partition("\n")[0], True))
    boxed = find_boxed(text)
    if boxed is not None:
        parts.append((boxed, False))
    return [*parts, (text, False)]


def find_boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{...}` or `\\fbox{...}` of a text, or of `\\boxed x`; None without one."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].partition("boxed" if text.startswith("\\boxed", start) else "fbox")[2]
    if not rest.lstrip().startswith("{"):
        return rest.strip().partition("$")[0].partition("\n")[0].strip() or None
    rest, depth = rest.lstrip(), 0
    for position, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:position]
    return None  # never closed: the reply was cut


def _read(match: re.Match[str]) -> tuple[Fraction, ...] | None:
    if len(match[0]) > MAX_DIGITS:
        return None
    try:
        top, bottom = match["top"] or match["top_digit"], match["bottom"] or match["bottom_digit"]
        if top is not None:
            value = read_decimal(match["whole"] or "0") + read_decimal(top) / read_decimal(bottom)
        elif match["over"] is not None:
            value = read_decimal(match["mixed"] or "0") + read_decimal(match["over"]) / read_decimal(match["under"])
        else:
            value = read_decimal(match["decimal"])
    except (ZeroDivisionError, ValueError):
        return None
    value = -value if match["sign"] in ("-", "\u2212") else value
    return (value, value / 100) if match["percent"] else (value,)


def read_decimal(text: str) -> Fraction:
    """Return the value of a decimal number with its thousands separators. Raises: ValueError."""
    return Fraction(re.sub(r"[,\s]", "", text).replace("\u2212", "-"))


def float_or_text(value: Fraction) -> str:
    """Return a fraction as people write it."""
    return str(value) if value.denominator == 1 else f"{float(value):g}"
