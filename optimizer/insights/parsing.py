"""Reads operations on insights from a critic's answer: JSON of the schema, or lines in any of many habits.

Models number, embolden, fence and explain the lines that they should write plainly, so the form is read tolerantly.
Hazard: a sentence of prose that is taken for a lesson is shown to the agent. A line that could be either ("Add more
salt") is therefore prose.

Flow: answer -> reasoning stripped -> `ParsedOperation` operations (JSON, else lines) -> matched with the known list.
"""

# ruff: noqa: RUF001  (models write dashes and quotation marks of every kind)
from __future__ import annotations

import ast
import contextlib
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memory.records.insights import InsightOperation, OperationKind

MAX_OPERATIONS = 4  # a critique, as in ExpeL
MAX_INSIGHT_CHARS = 300
MAX_ANSWER_CHARS = 50_000
MAX_OBJECTS = 200
MATCH_RATIO = 0.8  # two texts this alike are the same insight, misquoted
NUMBERED_RATIO = 0.5  # enough where the number points to the same insight
MIN_LETTERS = 8  # of a lesson; scripts without spaces say as much in fewer
MIN_LETTERS_UNSPACED = 4

InsightScope = tuple[str, str]
"""(environment, kind of task): the tasks that a lesson holds for."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "operations": {
            "type": "array",
            "maxItems": MAX_OPERATIONS,
            "items": {
                "type": "object",
                "properties": {
                    "op": {"type": "string", "enum": ["ADD", "EDIT", "AGREE", "REMOVE"]},
                    "number": {"type": ["integer", "null"]},
                    "text": {"type": "string"},
                },
                "required": ["op", "number", "text"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["operations"],
    "additionalProperties": False,
}
"""The JSON schema of an answer, for engines that can hold a model to one."""

_OPS = "ADD|EDIT|AGREE|REMOVE"
_NOUN = r"(?:with\s+)?(?:the\s+)?(?:(?:rule|lesson|insight|item|number|point|no\.)\s*)?"
_THINKING = re.compile(
    r"<(think|thinking|reasoning|thought|scratchpad)>.*?(?:</\1>|\Z)|\[THINK\].*?(?:\[/THINK\]|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_THINKING_END = re.compile(r"</(?:think|thinking|reasoning|thought|scratchpad)>|\[/THINK\]", re.IGNORECASE)
_FINAL = re.compile(r"^\W*final\s+(?:answer|operations?|list|output)\b[^\w\n]*", re.IGNORECASE | re.MULTILINE)
_TAG = re.compile(rf"<({_OPS})(?:\s+(?:number|id|n)\s*=\s*[\"']?(\d+)[\"']?)?\s*>", re.IGNORECASE)
_TAG_WITH_OP = re.compile(
    rf"<operation\s+(?:type|op|kind)\s*=\s*[\"']({_OPS})[\"'](?:\s+number\s*=\s*[\"']?(\d+)[\"']?)?\s*>", re.IGNORECASE
)
_TAG_END = re.compile(rf"</(?:{_OPS}|operations?)>|<operations>", re.IGNORECASE)
_CALL = re.compile(rf"^(\W*)({_OPS})\(\s*(?:(\d+)\s*,?\s*)?([\"'].*[\"'])?\s*\)\W*$", re.MULTILINE)
_NEXT_ON_LINE = re.compile(
    rf"(?<=[.!?;\"”)])\s+(?=(?:{_OPS})\s*[#\[(]?\d*[\])]?\s*:)|(?<=[;,])\s+(?=(?:{_OPS})\s+[#\[(]?\d)"
)
# No ">" before an operator: a quoted line is no answer, and the transcripts mark actions so.
_HEADER = re.compile(
    rf"""^(?P<marks>(?:[-=]>|[^\w>]|_)*)
    (?P<count>\(?\d{{1,2}}\s*[.):\]–-]+\s*[*_`\[]*)?
    (?P<label>(?:operation|op|change|action|step|item|suggestion|update|(?:final\s+)?answer|output)
        \s*\#?\d*[*_`]*\s*[:.)–—-]+[\s*_`"'\[]*)?
    (?P<op>{_OPS})(?=\b|_+(?:\W|$))(?P<bold>[*_`"'\])]*)
    \s*(?P<noun>{_NOUN})[*_`]*[\[(<{{\#№]*\s*
    (?P<numbers>\d{{1,3}}(?:\s*(?:,|and|&)\s*\#?\d{{1,3}})*(?!\w))?\s*[\])>}}*_`]*
    \s*(?P<sep>::?|[-=]>|→|⇒|—|–|-(?=\s)|=|\.(?=\s|$)|,|;|\||(?=\()|(?=because\b|since\b))?[*_`]*\s*
    (?P<rest>.*)$""",
    re.IGNORECASE | re.VERBOSE,
)
_LEADING_NUMBER = re.compile(
    rf"^{_NOUN}[\[(<#]*\s*(\d{{1,3}})\s*[\])>]*(?:\s*(?:[:.–—)]|-(?=\s)|[-=]>|→|⇒)+\s*|\s*$|\s+(?=\())", re.IGNORECASE
)
_NUMBER_FIELD = re.compile(r"^\W*(?:lesson |rule )?(?:number|index|no\.?)\W*[:=]\s*(\d+|null|none|n/a|-)\W*$", re.I)
_TEXT_FIELD = re.compile(r"^\W*(?:the\s+)?(?:new\s+)?(?:lesson|text|rule|insight|content)[*_`]*\s*:[*_`]*\s*", re.I)
_OLD_FIELD = re.compile(
    r"^\W*(?:old|original|before|from|current)(?:\s+(?:text|lesson|version|rule|wording))?[*_`\"]*\s*:", re.I
)
_NEW_FIELD = re.compile(
    r"^\W*(?:new|revised|updated|improved|after|to)(?:\s+(?:text|lesson|version|rule|wording))?[*_`\"]*\s*:[*_`]*\s*",
    re.I,
)
_REASON_FIELD = re.compile(
    r"^\W*(?:reason(?:ing)?|rationale|explanation|evidence|justification|why|note|notes|support|source|comment|"
    r"confidence|examples?|context)\b[^:\n]{0,30}:",
    re.IGNORECASE,
)
_INLINE_REASON = re.compile(
    r"\s+[-–—(\[]*\s*[*_]*(?:reason(?:ing)?|rationale|explanation|evidence|justification|why|note)[*_]*:.*$", re.I
)
_REMARK = re.compile(
    r"^\W*(?:this|these|that|both|it|its|all|as|because|since|the\s+(?:won|lost|winning|losing|failed|successful|same)|"
    r"confirm\w*|support\w*|contradict\w*|duplicate\w*|redundant|same\s+as|consistent|seen|evidence|match\w*|"
    r"repeat\w*|already|holds|held|still|proved|proven|shown|yes|episodes?|no\s+longer|wrong|incorrect|outdated)\b",
    re.IGNORECASE,
)
_TRAILING_REMARK = re.compile(r"\s*[(\[]([^()\[\]]*)[)\]]\s*\.?$")
_BULLET = re.compile(r"^\s*(?:[-*•▪+]|(?P<count>\d{1,2})\s*[.):])\s+(?P<text>\S.*)$")
_FENCE = re.compile(r"^\s*(?:```|~~~)\w*\s*$")
_ARROW = re.compile(r"\s*(?:[-=]+>|→|⇒|➜)\s*|\s+(?:to|with|becomes)\s*:?\s+(?=[\"'“])")
_NO_LESSON = re.compile(
    r"^(?:none|n/?a|null|nothing|not applicable|no\s+(?:new\s+|further\s+|more\s+|other\s+)*"
    r"(?:lessons?|changes?|operations?|insights?|rules?|additions?)\b.*)\W*$",
    re.IGNORECASE,
)
_NOTHING = re.compile(r"\bNOTHING\b|(?i:^\W*nothing\W*$|\bno (?:changes?|operations?|updates?)\b)", re.MULTILINE)
_PLACEHOLDERS = {"a lesson that is missing", "that lesson, put better", "lesson", "text", "new lesson", "your lesson"}
_QUOTES = {'""', "''", "“”", "‘’", "«»", "<>", "[]", "``", "**", "„“", "「」"}
_KINDS = {kind.value for kind in OperationKind}
_OP_KEYS = ("op", "operation", "action", "type", "kind")
_NUMBER_KEYS = ("number", "lesson_number", "index", "n", "id", "no")
_NEW_KEYS = ("new_text", "new", "new_lesson", "revised", "to")
_TEXT_KEYS = ("text", "lesson", "insight", "rule", "content", "description", "value")


@dataclass(frozen=True)
class ParsedOperation:
    """One operation as the critic wrote it, not yet matched with the known insights."""

    kind: OperationKind
    number: int | None
    text: str
    old_text: str = ""
    """The old text of an EDIT, where the critic quotes it separately."""


def parse_operations(answer: str, scope: InsightScope, known: Sequence[str]) -> list[InsightOperation] | None:
    """Read at most `MAX_OPERATIONS` operations out of a critic's answer; None where it is not an answer.

    AGREE and REMOVE are matched by the quoted text, because models miscount; by the number only where no text was
    quoted. EDIT brings a new text, so it is matched by the number, or by the old text that is quoted with it.
    """
    written = read_answer(answer)
    if written is None:
        return None
    operations = [operation for each in written if (operation := _resolve(each, scope, known)) is not None]
    return list(dict.fromkeys(operations))[:MAX_OPERATIONS]


def read_answer(answer: str) -> list[ParsedOperation] | None:
    """Return the operations in order; an empty list where the critic wants no change, None for an unreadable answer."""
    # the end, where the answer stands; the bound also limits the regular expressions below
    answer = _strip_thinking(answer[-MAX_ANSWER_CHARS:])
    # JSON first: its lines would be taken for prose or for operations
    found = _read_json(answer)
    if found is not None:
        return found
    parts = _FINAL.split(answer)
    for part in (parts[-1], answer):  # a draft that is repeated as the final answer counts once
        written = list(_read_lines(_normalise(part)))
        if written:
            return written
    return [] if _NOTHING.search(answer) else None


def _strip_thinking(answer: str) -> str:
    stripped = _THINKING.sub("\n", answer)
    return _THINKING_END.split(stripped)[-1]  # templates open the tag in the prompt: only its end is written


def _read_json(answer: str) -> list[ParsedOperation] | None:
    """Return the operations in the JSON of an answer; None without any. Truncated objects are skipped."""
    found: list[ParsedOperation] = []
    is_empty_list = False
    for value in _find_values(answer):
        is_empty_list |= isinstance(value, dict) and value.get("operations") == []
        found += _walk(value)
    if not found:
        for chunk in re.findall(r"\{[^{}]{1,2000}\}", answer):  # Python's own notation
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                # never eval: the text is a model's. MemoryError and RecursionError come from nested brackets
                found += _walk(ast.literal_eval(chunk))
    is_empty_list |= answer.strip("`json \n") == "[]"
    return found or ([] if is_empty_list else None)


def _find_values(text: str) -> Iterator[Any]:
    """Yield the JSON objects in a text, also those of an array that is cut off."""
    decoder = json.JSONDecoder()
    start = 0
    for _ in range(MAX_OBJECTS):  # each try may read to the end of the text
        start = text.find("{", start)
        if start < 0:
            return
        try:
            value, start = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start += 1
        else:
            yield value


def _walk(value: object) -> Iterator[ParsedOperation]:
    if isinstance(value, list):
        for each in value:
            yield from _walk(each)
    if not isinstance(value, dict):
        return
    fields = {str(key).lower(): each for key, each in value.items()}
    kind, number = _kind_of(fields)
    if kind is not None:
        number = _number_of(fields) or number
        text = _first_text(fields, _TEXT_KEYS)
        new = _first_text(fields, _NEW_KEYS) if kind is OperationKind.EDIT else ""
        old = text if new else _first_text(fields, ("old_text", "old", "old_lesson", "original", "from"))
        yield ParsedOperation(kind, number, new or text, old)
        return
    for key, each in fields.items():
        if key in _KINDS:
            yield from _walk_named(OperationKind(key), each)
        elif isinstance(each, list | dict):
            yield from _walk(each)


def _kind_of(fields: dict[str, Any]) -> tuple[OperationKind | None, int | None]:
    for key in _OP_KEYS:
        match = re.match(rf"\s*({_OPS})\b\W*(\d+)?\s*$", str(fields.get(key, "")), re.IGNORECASE)
        if match is not None:
            return OperationKind(match[1].lower()), int(match[2]) if match[2] else None
    return None, None


def _number_of(fields: dict[str, Any]) -> int | None:
    for key in (*_NUMBER_KEYS, "lesson", "rule", "insight"):
        value = fields.get(key)
        # bool is an int: `true` would be lesson 1
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().isdecimal():
            return int(value)
    return None


def _first_text(fields: dict[str, Any], keys: Sequence[str]) -> str:
    return next((value for key in keys if isinstance(value := fields.get(key), str) and value.strip()), "")


def _walk_named(kind: OperationKind, value: object) -> Iterator[ParsedOperation]:
    """Read `{"ADD": ["..."], "AGREE": [1], "EDIT": {"2": "..."}}`."""
    if isinstance(value, dict):
        pairs = value.items()
        if all(str(key).isdecimal() and isinstance(text, str) for key, text in pairs):
            yield from (ParsedOperation(kind, int(key), text) for key, text in pairs)
            return
        value = [value]
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, dict):
            yield from _walk({**each, "op": kind.value})
        elif isinstance(each, str):
            yield ParsedOperation(kind, None, each)
        elif isinstance(each, int) and not isinstance(each, bool):
            yield ParsedOperation(kind, each, "")


def _normalise(answer: str) -> str:
    """Return the answer with tags, calls and operations that share a line brought into the form of lines."""
    answer = answer.replace("\uff1a", ":").replace("<number>", "")
    for tag in (_TAG_WITH_OP, _TAG):
        answer = tag.sub(lambda match: f"\n{match[1].upper()}{' ' + match[2] if match[2] else ''}: ", answer)
    answer = _TAG_END.sub("\n\n", answer)
    answer = _CALL.sub(lambda m: f"{m[1]}{m[2]}{' ' + m[3] if m[3] else ''}: {m[4] or ''}", answer)
    return _NEXT_ON_LINE.sub("\n", answer)


def _read_lines(answer: str) -> Iterator[ParsedOperation]:
    lines = answer.splitlines()
    headers = [_read_header(line) for line in lines]
    for index, found in enumerate(headers):
        if not found:
            continue
        end = next((later for later in range(index + 1, len(lines)) if headers[later]), len(lines))
        if len(found) > 1:
            yield from found
        else:
            yield from _read_body(found[0], lines[index + 1 : end])


def _read_header(line: str) -> list[ParsedOperation]:
    """Return the operation that begins on this line, several for `AGREE 1, 3`, none for prose."""
    if line.lstrip().startswith("|"):
        return _read_table_row(line)
    match = _HEADER.match(line)
    if match is None or not _is_header(match):
        return []
    kind, rest = OperationKind(match["op"].lower()), match["rest"]
    numbers = [int(number) for number in re.findall(r"\d+", match["numbers"] or "")]
    if not numbers and kind is not OperationKind.ADD and (leading := _LEADING_NUMBER.match(rest)):
        numbers, rest = [int(leading[1])], rest[leading.end() :]
    if len(numbers) > 1:
        return [ParsedOperation(kind, number, "") for number in numbers] if kind is not OperationKind.ADD else []
    return [ParsedOperation(kind, numbers[0] if numbers else None, rest)]


def _is_header(match: re.Match[str]) -> bool:
    """Whether a line that begins with an operator's word is an operation; in doubt it is prose."""
    op, sep, rest = match["op"], match["sep"], match["rest"].strip(" *_`")
    is_marked = bool(match["label"] or match["bold"] or match["marks"].strip() or match["count"])
    if not match["numbers"] and (match["noun"] or sep in (",", ";")):
        return False
    if sep in (":", "::"):
        return True
    is_shouted = op.isupper() and not _line_is_shouted(match.string)
    if op == "ADD" and match["numbers"] and sep is None:
        return False  # "ADD 2 eggs"
    if not rest:
        return bool(match["numbers"] and op.lower() != "add") or (op.isupper() or is_marked)
    if match["numbers"] and op.lower() != "add" and sep is not None:
        return sep != "-" or is_shouted or is_marked
    if is_shouted:
        starts_a_sentence = rest[0].isupper() or rest[0] in "\"'“<[(" or rest[0].isdigit()
        return sep in ("->", "=>", "→", "⇒", "—", "–", "-", "=") or starts_a_sentence or bool(match["label"])
    return is_marked and sep in ("->", "=>", "→", "⇒", "—", "–", "-", "=")


def _line_is_shouted(line: str) -> bool:
    """Whether a line has words in capitals only, so that capitals don't tell an operator."""
    words = re.findall(r"[^\W\d_]{2,}", line)
    return len(words) > 2 and all(word.isupper() for word in words)


def _read_table_row(line: str) -> list[ParsedOperation]:
    cells = [cell.strip(" *_`") for cell in line.strip().strip("|").split("|")]
    index = next((i for i, cell in enumerate(cells) if re.fullmatch(rf"({_OPS})(\s+\d+)?", cell, re.I)), None)
    if index is None:
        return []
    op, _, number = cells[index].partition(" ")
    others = cells[index + 1 :]
    numbers = [cell.lstrip("#") for cell in others if cell.lstrip("#").isdecimal()] or [number]
    text = next((cell for cell in others if len(cell) > 3), "")
    return [
        ParsedOperation(OperationKind(op.lower()), int(numbers[0]) if numbers[0].strip().isdecimal() else None, text)
    ]


def _read_body(header: ParsedOperation, lines: Sequence[str]) -> Iterator[ParsedOperation]:
    """Complete an operation with the lines that follow it."""
    if _clean(header.text):
        yield _continue(header, lines)
        return
    body = [line for line in lines if not _FENCE.match(line)]
    while body:
        number = _NUMBER_FIELD.match(body[0])
        if body[0].strip() and number is None:
            break
        if number is not None and number[1].isdecimal():
            header = replace(header, number=int(number[1]))
        body = body[1:]
    if not body or _REASON_FIELD.match(body[0]):
        yield header
    elif header.number is None and _BULLET.match(body[0]) and not _is_field(body[0]):
        yield from _read_bullets(header.kind, body)
    elif header.number is not None and header.kind in (OperationKind.AGREE, OperationKind.REMOVE):
        yield header if _REMARK.match(body[0]) else _continue(replace(header, text=body[0]), body[1:])
    else:
        yield _read_fields(header, body)


def _is_field(line: str) -> bool:
    return bool(_OLD_FIELD.match(line) or _NEW_FIELD.match(line) or _TEXT_FIELD.match(line))


def _read_bullets(kind: OperationKind, lines: Sequence[str]) -> Iterator[ParsedOperation]:
    for index, line in enumerate(lines):
        match = _BULLET.match(line)
        if match is None:
            if not line.strip() or index == 0:
                continue
            if line[:1].isspace():  # the rest of the bullet above
                continue
            return
        number, text = match["count"], match["text"]
        if kind is OperationKind.ADD:
            number = None
        elif number is None and (leading := _LEADING_NUMBER.match(text)):
            number, text = leading[1], text[leading.end() :]
        yield _continue(ParsedOperation(kind, int(number) if number else None, text), lines[index + 1 :])


def _read_fields(header: ParsedOperation, lines: Sequence[str]) -> ParsedOperation:
    """Read `Old: ... New: ...`, `Lesson: ...`, or the plain lines of a lesson."""
    old = ""
    for index, line in enumerate(lines):
        if match := _OLD_FIELD.match(line):
            old = line[match.end() :]
            continue
        if old and not line.strip():
            continue
        if header.kind is OperationKind.EDIT and line.startswith("- ") and any(x.startswith("+ ") for x in lines):
            continue  # a diff: what is taken away, then what takes its place
        line = line.removeprefix("+ ") if header.kind is OperationKind.EDIT else line
        for field in (_NEW_FIELD, _TEXT_FIELD):
            if match := field.match(line):
                line = line[match.end() :]
                break
        return _continue(replace(header, text=line, old_text=_clean(old)), lines[index + 1 :])
    return header


def _continue(header: ParsedOperation, lines: Sequence[str]) -> ParsedOperation:
    """Join the wrapped lines of a text: up to a blank line, the end of a sentence, a bullet or an explanation."""
    text = header.text.strip()
    for line in lines:
        is_over = not line.strip() or _BULLET.match(line) or _FENCE.match(line) or _REASON_FIELD.match(line)
        if is_over or re.search(r"[.!?。！？][\"'”*_`)\]]*$", text) or re.match(rf"\s*[>#|]|\W*(?:{_OPS})\b", line):
            break
        if match := _NEW_FIELD.match(line):
            return _continue(replace(header, text=line[match.end() :], old_text=_clean(text)), lines[1:])
        text = f"{text} {line.strip()}"
    return replace(header, text=text)


def _resolve(written: ParsedOperation, scope: InsightScope, known: Sequence[str]) -> InsightOperation | None:
    text = _clean(written.text)
    if written.kind is OperationKind.ADD:
        return InsightOperation(written.kind, *scope, text) if is_lesson(text) else None
    # numbered from 1, as critique._write_messages does
    numbered = known[written.number - 1] if written.number and 1 <= written.number <= len(known) else None
    if written.kind is OperationKind.EDIT:
        return _resolve_edit(written, text, scope, known, numbered)
    quoted = find_known(text, known)
    if quoted is None and numbered is not None:
        is_no_quotation = not re.search(r"\w", text) or _REMARK.match(text)
        quoted = numbered if is_no_quotation or _likeness(text, numbered) >= NUMBERED_RATIO else None
    return InsightOperation(written.kind, *scope, quoted) if quoted is not None else None


def _resolve_edit(
    written: ParsedOperation, text: str, scope: InsightScope, known: Sequence[str], numbered: str | None
) -> InsightOperation | None:
    old = find_known(written.old_text, known)
    for arrow in _ARROW.finditer(text):
        before = _clean(text[: arrow.start()])
        if (quoted := find_known(before, known)) is not None and arrow.end() < len(text):
            old, text = quoted, _clean(text[arrow.end() :])
            break
    old = numbered or old
    if old is None or not is_lesson(text):
        return None
    return InsightOperation(written.kind, *scope, old, new_text=text)


def find_known(text: str, known: Sequence[str]) -> str | None:
    """Return the known insight that `text` quotes, perhaps inexactly or with a remark behind it."""
    plain = _plain(text)
    if not plain:
        return None
    for each in known:
        if plain.startswith(_plain(each) + " ") or plain == _plain(each):
            return each
    best = max(known, key=lambda each: _likeness(text, each), default=None)
    return best if best is not None and _likeness(text, best) >= MATCH_RATIO else None


def _likeness(one: str, other: str) -> float:
    # autojunk: from 200 characters on it ignores frequent characters, which changes the ratio
    return difflib.SequenceMatcher(None, _plain(one), _plain(other), autojunk=False).ratio()


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def is_lesson(text: str) -> bool:
    """Whether a text is long enough for a lesson, and not a word of the answer format itself."""
    if text.casefold().strip(" .") in _PLACEHOLDERS or _NO_LESSON.match(text):
        return False
    if re.match(rf"\W*(?:{_OPS})\b\W*(?:\d+\W*)?$", text) or re.match(rf"\W*(?:{_OPS})\s*\d*\s*:", text):
        return False
    letters = [character for character in text if character.isalpha()]
    if letters and all(ord(character) > 0x2E7F for character in letters):
        return len(letters) >= MIN_LETTERS_UNSPACED
    return len(letters) >= MIN_LETTERS and len(re.findall(r"\w+", text)) > 1


def _clean(text: str) -> str:
    """Return a lesson without the marks around it, in one line, cut at a word."""
    text = " ".join(text.replace("**", "").replace("__", "").split())
    text = _INLINE_REASON.sub("", text)
    if (remark := _TRAILING_REMARK.search(text)) and _REMARK.match(remark[1]):
        text = text[: remark.start()]
    text = re.sub(rf"^(?:{_OPS})\s*:\s*(?=\S)", "", text.strip())
    while len(text) > 1 and text[0] + text[-1] in _QUOTES and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    text = re.sub(r"^[*`:\s]+|[*`\s]+$", "", text)
    if len(text) > MAX_INSIGHT_CHARS:
        # as UTF-8, so many characters stay below PostgreSQL's limit for an index key (2.7 KB)
        text = text[:MAX_INSIGHT_CHARS].rsplit(" ", 1)[0]
    return text
