"""The grader of mathematical answers in LaTeX: two answers are equal if their normal forms are.

The reply's answer is its last `\\boxed{}`, else the rest of the line behind "answer is", else the whole reply. The
normal form has no spacing, fonts, units and sizes of brackets, and one way to write fractions, roots and degrees;
numbers are compared by value, and tuples, intervals, sets and matrices element by element. In the manner of the
checkers of MATH (arXiv 2103.03874) and PRM800K (arXiv 2305.20050), but without an algebra system: `x+1` and `1+x`
differ, because an algebra system may take for ever on a reply that was written against it.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

from runtime.environments.base import Outcome
from runtime.environments.graders.base import Grader, GradingResources, Submission, quote, right, wrong
from runtime.environments.graders.numeric import MAX_DIGITS, find_boxed, read_decimal
from runtime.environments.graders.text import Answers, list_answers

MAX_ANSWER_CHARS = 2_000
ROW_BREAK = "\x1e"
"""Stands for the `\\\\` of a matrix in normalised text."""
_MARKED = re.compile(r"(?:final\s+)?answer\s*(?:is|:)\s*(?P<answer>[^\n]+)", re.IGNORECASE)
# In this order: a later rule reads what an earlier one has written.
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])", ""),
        (r"\\(?:!|,|;|:|>| |quad\b|qquad\b)", " "),
        (r"~", " "),
        (r"\\\$|\$", ""),
        (r"[£€¥]", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:displaystyle|textstyle|limits)(?![a-zA-Z])", ""),
        (r"\\(?:leq|leqslant|le)(?![a-zA-Z])|≤", r"\\le "),
        (r"\\(?:geq|geqslant|ge)(?![a-zA-Z])|≥", r"\\ge "),
        (r"\\(?:neq|ne)(?![a-zA-Z])|≠", r"\\ne "),
        ("\\\\(?:cdot|times)(?![a-zA-Z])|[\u00b7\u00d7]", "*"),
        (r"\\(?:infin|infty)(?![a-zA-Z])|∞", r"\\infty "),
        (r"\\pi(?![a-zA-Z])|π", r"\\pi "),
        ("[\u2212\u2013]", "-"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        # Units, in a box of text behind a number: "5 \text{ cm}^2".
        (r"(?<=[\d}\s)])\s*\\(?:text|mbox|textrm|mathrm)\s*\{\s*(?!and\b|or\b)[^{}]*\}(?:\s*\^\s*\{?\d\}?)?\s*$", ""),
        (r"\\(?:text|mbox|textrm|textbf|textit|mathrm|mathbf|mathit|mathsf|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![a-zA-Z])|°", ""),
        (r"\\?%", ""),
        (r"\\(frac|sqrt)\s+(?=[{\w])", r"\\\1"),
    )
)
_UNITS = re.compile(
    r"(?<=[\d}\s])\s*(?:degrees?|dollars?|cents?|units?|square|cubic|inch(?:es)?|feet|foot|miles?|meters?|cm|km|mm|"
    r"hours?|minutes?|seconds?|days?|years?|points?|ways?|per|hour|week)(?:\^\{?\d\}?)?\s*$",
    re.IGNORECASE,
)
_JOINING_WORDS = re.compile(r"(?:(?<=[\d})\]])|^)(?:and|or)(?=[-\d\\(\[])")
_OPENING, _CLOSING = "([{", ")]}"
_MATRIX = (r"\begin{matrix}", r"\end{matrix}")


class LatexAnswer(Grader):
    """The reply's mathematical answer equals the expected one."""

    type: Literal["latex"]
    answer: Answers

    async def grade(self, submission: Submission, resources: GradingResources) -> Outcome:
        given = find_answer(submission.text)
        if given is None:
            return wrong(f"no answer in {quote(submission.text)}")
        if any(are_equal(given, answer) for answer in list_answers(self.answer)):
            return right(f"{quote(given)} is the answer")
        return wrong(f"expected {quote(self.answer)}, not {quote(given)}")


def find_answer(text: str) -> str | None:
    """Return the mathematical answer that a reply gives; None if it is empty or longer than an answer is."""
    boxed = find_boxed(text)
    marked = list(_MARKED.finditer(text))
    answer = boxed if boxed is not None else marked[-1]["answer"] if marked else text
    return answer if answer.strip() and len(answer) <= MAX_ANSWER_CHARS else None


def are_equal(left: str, right_: str) -> bool:
    """Return whether two LaTeX answers are equal once they are normalised."""
    return _are_equal(normalize(left), normalize(right_))


def _are_equal(left: str, right_: str) -> bool:
    if left == right_:
        return True
    values = _value_of(left), _value_of(right_)
    if None not in values:
        return values[0] == values[1]
    (brackets, parts), (other_brackets, other_parts) = _split_list(left), _split_list(right_)
    if brackets != other_brackets or len(parts) != len(other_parts) or parts == [left]:
        return False
    if brackets:
        return all(map(_are_equal, parts, other_parts))
    rest = list(other_parts)
    for part in parts:
        match = next((other for other in rest if _are_equal(part, other)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def normalize(text: str) -> str:
    """Return a LaTeX answer in its normal form; not meant to be compiled."""
    text = text.strip().rstrip(".").strip()
    text = re.sub(r"\\begin\{(array|[bBpvV]?matrix)\}(?:\{[^{}]*\})?", r"\\begin{matrix}", text)
    text = re.sub(r"\\end\{(array|[bBpvV]?matrix)\}", r"\\end{matrix}", text)
    text = text.replace("\\\\", ROW_BREAK)  # before `\\ `, which is a space
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _UNITS.sub("", text)
    text = _drop_name(text.strip())
    text = re.sub(r"\s+", "", text)
    text = _brace_arguments(text)
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)
    text = re.sub(r"(?<![\w.}\\])(-?)(\d+)/(\d+)(?![\w.{])", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"\\frac\{-(\w+)\}", r"-\\frac{\1}", text)
    return text.rstrip(".,;")


def _drop_name(text: str) -> str:
    """Return what follows `x =` or `x \\in`; an equation with more on its left stays."""
    return re.sub(r"^\s*(?:[a-zA-Z]\w{0,2}|[a-zA-Z]\([a-zA-Z]\))\s*(?:=|\\in(?![a-z]))\s*(?=\S)", "", text, count=1)


def _brace_arguments(text: str) -> str:
    """Return the text with braces around every argument of `\\frac` and `\\sqrt`: `\\frac12`, `\\sqrt3`."""
    text = re.sub(r"\\sqrt(?![\[{a-zA-Z])(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac(?![{a-zA-Z])(\w)(?=[{\w\\])", r"\\frac{\1}", text)
    return re.sub(r"(\\frac\{[^{}]*\})(?!\{)(\w)", r"\1{\2}", text)


def _value_of(text: str) -> Fraction | None:
    """Return the value of a normalised number or fraction of two numbers; None for everything else."""
    if len(text) > MAX_DIGITS:
        return None
    decimal = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
    match = re.fullmatch(rf"([-+]?)({decimal})", text)
    if match:
        value = read_decimal(match[2])
        return -value if match[1] == "-" else value
    match = re.fullmatch(rf"([-+]?)(\d+)?\\frac\{{({decimal})\}}\{{(-?{decimal})\}}", text)
    if not match or not read_decimal(match[4]):
        return None
    value = Fraction(match[2] or 0) + read_decimal(match[3]) / read_decimal(match[4])
    return -value if match[1] == "-" else value


def _split_list(text: str) -> tuple[str, list[str]]:
    """Return the brackets and the elements of a normalised tuple, interval or matrix. A set, a list of solutions and
    everything else have no brackets, because their order does not count."""
    if text.startswith(_MATRIX[0]) and text.endswith(_MATRIX[1]):
        rows = text.removeprefix(_MATRIX[0]).removesuffix(_MATRIX[1]).split(ROW_BREAK)
        # An empty cell ends each row, so that a row and a column of the same numbers differ.
        return "matrix", [cell for row in rows if row for cell in (*row.split("&"), "")]
    if not _is_wrapped(text):
        return "", _split_outside_brackets(text)
    if text.startswith("\\{"):
        return "", _split_outside_brackets(text[2:-2])
    brackets = text[0] + text[-1]
    return "" if brackets == "{}" else brackets, _split_outside_brackets(text[1:-1])


def _is_wrapped(text: str) -> bool:
    """Return whether one pair of brackets, of the same kind or not, holds the whole text."""
    text = text.removeprefix("\\")
    if not text.startswith(tuple(_OPENING)) or not text.endswith(tuple(_CLOSING)):
        return False
    depth = 0
    for position, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0:
            return position == len(text) - 1
    return False


def _split_outside_brackets(text: str) -> list[str]:
    """Split at commas, and at the words "and" and "or", that stand in no brackets."""
    parts, depth, start = list[str](), 0, 0
    for position, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        # Also the comma of 1,000; where both sides are such numbers, `_value_of` has compared them before.
        if character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return [each for part in parts for each in _JOINING_WORDS.split(part) if each]
