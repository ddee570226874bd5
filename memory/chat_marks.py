"""Breaks chat markers in text of others with a space, so that no tokenizer reads a special token in it.

`ChatMarks` has the tokens of one tokenizer, read from its files, and is applied to every prompt on its way to the
engine. `neutralise` breaks the markers of all model families, for text that outlives a model: memories, web pages and
the output of MCP servers.

Invariants: only spaces are added; the time is linear in the text, and long texts are worked on in pieces.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SlicedWork = Generator[None, None, T]
"""Work that yields after each of its pieces and returns its result."""
SLICE_SECONDS = 0.001
"""An event loop runs other tasks after the piece that ends later than this."""
PIECE_CHARS = 8192
"""Characters that are worked on at once: a few milliseconds at the most, and more than twice any marker."""

_LOOKALIKES = "memory|tool_call|tool_response|tools|think|function_calls"
_CONTROLS = "s|inst|sys|bos|eos|pad|unk|start_of_turn|end_of_turn|start_of_image|end_of_image|sop|eop"
_BRACKETED = (
    "inst|system_prompt|available_tools|tool_calls|tool_results|tool_content|args|call_id|think|img|img_break|img_end|"
    "audio|begin_audio|prefix|middle|suffix|gmask|smask"
)

Marks = Sequence[tuple[re.Pattern[str], str]]
"""The beginnings of markers, each with the text that replaces it: its first character and a space."""


def _pattern_of(marks: Sequence[str]) -> str:
    """Return a regular expression for any of `marks`, as a tree of their common prefixes."""
    by_first: dict[str, list[str]] = {}
    for mark in marks:
        by_first.setdefault(mark[:1], []).append(mark[1:])
    # The end of a mark is optional and last, so that the longest mark matches first.
    ends_here = "" in by_first
    branches = [re.escape(first) + _pattern_of(rests) for first, rests in by_first.items() if first]
    if not branches:
        return ""
    joined = branches[0] if len(branches) == 1 and not ends_here else f"(?:{'|'.join(branches)})"
    return f"{joined}?" if ends_here else joined


def _compile_tags(angled: str, *, spaces: str = r"\s*+", besides: str = "") -> Marks:
    # Possessive quantifiers: two `\s*` in a row take quadratic time over a long run of spaces. A match is one character
    # that a plain text replaces: a longer one, or a function, takes three times as long over a text of nothing else.
    in_angles, in_brackets = (
        rf"{spaces}/?{spaces}{_pattern_of(names.split('|'))}{spaces}" for names in (angled, _BRACKETED)
    )
    return (
        (re.compile(rf"<{besides}(?={in_angles}>)", re.IGNORECASE), "< "),
        (re.compile(rf"\[(?={in_brackets}\])", re.IGNORECASE), "[ "),
    )


CHAT_TAGS = _compile_tags(f"{_LOOKALIKES}|{_CONTROLS}")
CHAT_TAGS_BUT_FRAME = _compile_tags(f"{_LOOKALIKES}|{_CONTROLS}", besides="(?!(?-i:/?memory>))")
"""Without the frame of the memory segment, which this program itself writes into a user's message."""
CONTROL_TAGS = _compile_tags(_CONTROLS, spaces="")
BARS = (("<|", "< |"), ("<\uff5c", "< \uff5c"), ("|>", "| >"), ("\uff5c>", "\uff5c >"))
"""Of markers such as `<|im_start|>`; DeepSeek's bars are full-width."""
BRACKET = re.compile(r"[<\[]")
A_TAG = re.compile(r"[<\[][^\s<>\[\]]{1,60}[>\]]")
OWN_TAGS = frozenset({"<memory>", "</memory>"})
"""The frame of the memory segment."""
EXACT_ROLES = frozenset({"assistant", "system", "developer"})
"""Roles whose tags stay unless they are control tokens: a model's thoughts, and instructions about a format."""


def neutralise(text: str) -> str:
    """Break every chat marker of any family in a text, and every tag that would close the memory segment."""
    return run(_break_tags(text, CHAT_TAGS))


def _break_tags(text: str, tags: Marks) -> SlicedWork[str]:
    """Return the text with a space behind the first character of every tag and in every pair of `BARS`."""
    pieces: list[str] = []
    for piece in _cut_at_brackets(text):
        for bar, broken in BARS:
            piece = piece.replace(bar, broken)
        pieces.append(_break(piece, tags))
        yield
    return "".join(pieces)


def _cut_at_brackets(text: str) -> Iterator[str]:
    """Yield the text in pieces that end in front of a bracket: there is none within a tag, or at the end of a bar."""
    start = 0
    while cut := BRACKET.search(text, start + PIECE_CHARS):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _break(text: str, marks: Marks) -> str:
    for mark, broken in marks:
        text = mark.sub(broken, text)
    return text


class _Breaker:
    """Breaks a set of markers in time linear in the text, whatever their number: their prefixes form a tree."""

    def __init__(self, marks: Iterable[str]) -> None:
        self.marks = sorted({mark for mark in marks if len(mark) > 1})
        rests: dict[str, list[str]] = {}
        for mark in self.marks:
            rests.setdefault(mark[0], []).append(mark[1:])
        self._marks_by_first = {
            first: (re.compile(f"{re.escape(first)}(?={_pattern_of(rest)})"), first.replace("\\", r"\\") + " ")
            for first, rest in rests.items()
        }

    def break_marks(self, text: str) -> SlicedWork[str]:
        """Return the text with a space behind the first character of every marker."""
        marks = [mark for first, mark in self._marks_by_first.items() if first in text]
        # A marker that one cut parts is whole in the pieces of the other.
        first_cuts = (PIECE_CHARS, PIECE_CHARS // 2) if len(text) > PIECE_CHARS // 2 else (PIECE_CHARS,)
        broken = None if marks else text
        while broken != text:  # a space may complete a marker that has one inside
            broken = text
            for first_cut in first_cuts:
                pieces: list[str] = []
                for piece in _cut(text, first_cut):
                    pieces.append(_break(piece, marks))
                    yield
                text = "".join(pieces)
        return text


def _cut(text: str, first_cut: int) -> Iterator[str]:
    yield text[:first_cut]
    for start in range(first_cut, len(text), PIECE_CHARS):
        yield text[start : start + PIECE_CHARS]


class ChatMarks:
    """The markers of one tokenizer: `special` tokens control the chat, `tags` are other added tokens in brackets."""

    def __init__(self, special: Iterable[str], tags: Iterable[str] = ()) -> None:
        self._special = _Breaker(special)
        self._all = _Breaker([*self._special.marks, *tags])

    @classmethod
    def read(cls, directory: Path | None) -> ChatMarks | None:
        """Return the markers of the tokenizer in a directory; None where its files name none."""
        tokens = _read_added_tokens(directory) if directory is not None else {}
        if not tokens:
            return None
        tags = {token for token, is_special in tokens.items() if not is_special and A_TAG.fullmatch(token)}
        return cls((token for token, is_special in tokens.items() if is_special), tags - OWN_TAGS)

    def clean_messages(self, messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return messages without any special token in their texts."""
        return run(self.cleaning_of_messages(messages))

    def clean(self, value: T) -> T:
        """Return a JSON value, such as tool definitions, with the markers in all its texts broken."""
        return run(self.cleaning_of(value))

    def cleaning_of_messages(self, messages: Iterable[Mapping[str, Any]]) -> SlicedWork[list[dict[str, Any]]]:
        """Return the work of `clean_messages`."""
        cleaned: list[dict[str, Any]] = []
        for message in messages:
            change = self._clean_exact if message.get("role") in EXACT_ROLES else self._clean_others
            cleaned.append((yield from _map_texts(message, change)))
        return cleaned

    def cleaning_of(self, value: T) -> SlicedWork[T]:
        """Return the work of `clean`."""
        return _map_texts(value, self._clean_all)

    def _clean_exact(self, text: str) -> SlicedWork[str]:
        """Clean a text of one of the `EXACT_ROLES`."""
        return self._special.break_marks(text)

    def _clean_others(self, text: str) -> SlicedWork[str]:
        """Clean a text of another role, in which the frame of the memory segment stays."""
        return self._all.break_marks(text)

    def _clean_all(self, text: str) -> SlicedWork[str]:
        """Clean a text that is no message's."""
        return self._all.break_marks(text)


class _AnyChatMarks(ChatMarks):
    """The markers of all families, for a tokenizer whose files are not at hand."""

    def __init__(self) -> None:
        super().__init__(())

    def _clean_exact(self, text: str) -> SlicedWork[str]:
        return _break_tags(text, CONTROL_TAGS)

    def _clean_others(self, text: str) -> SlicedWork[str]:
        return _break_tags(text, CHAT_TAGS_BUT_FRAME)

    def _clean_all(self, text: str) -> SlicedWork[str]:
        return _break_tags(text, CHAT_TAGS)


ANY_FAMILY = _AnyChatMarks()


def run(work: SlicedWork[T]) -> T:
    """Do the whole work at once and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


async def run_in_slices(work: SlicedWork[T]) -> T:
    """Do the work on the event loop, in slices between which other tasks run, and return its result.

    In a thread it would hold up others just as much, because `re` holds the interpreter's lock.
    """
    started = time.monotonic()
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
        if time.monotonic() - started > SLICE_SECONDS:
            await asyncio.sleep(0)
            started = time.monotonic()


def _map_texts(value: Any, change: Callable[[str], SlicedWork[str]]) -> SlicedWork[Any]:
    """Apply `change` to every text and key in a JSON value."""
    yield
    if isinstance(value, str):
        return (yield from change(value))
    if isinstance(value, Mapping):
        changed: dict[Any, Any] = {}
        for key, inside in value.items():
            new_key = (yield from change(key)) if isinstance(key, str) else key
            changed[new_key] = yield from _map_texts(inside, change)
        return changed
    if isinstance(value, list | tuple):
        items: list[Any] = []
        for inside in value:
            items.append((yield from _map_texts(inside, change)))
        return items
    return value


def _read_added_tokens(directory: Path) -> dict[str, bool]:
    """Return each added token and whether it is special, from all files in which tokenizers store them."""
    tokens: dict[str, bool] = {}
    configs = [_read_json(directory / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    added = list(_read_json(directory / "tokenizer.json").get("added_tokens") or [])
    for config in configs:
        added += (config.get("added_tokens_decoder") or {}).values()
    for token in added:
        # special in one file is special: the files of a tokenizer may disagree
        tokens[token["content"]] = tokens.get(token["content"], False) or bool(token.get("special"))
    special = [
        token
        for config in configs
        for name, value in config.items()
        if name.endswith(("_token", "special_tokens"))
        for token in _tokens_in(value)
    ]
    mistral = _read_json(directory / "tekken.json").get("special_tokens") or []
    return tokens | dict.fromkeys([*special, *(token["token_str"] for token in mistral)], True)


def _tokens_in(value: object) -> list[str]:
    """Return the tokens in the value of a setting such as `eos_token` or `additional_special_tokens`."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return _tokens_in(value["content"]) if "content" in value else _tokens_in(list(value.values()))
    return [token for each in value for token in _tokens_in(each)] if isinstance(value, list) else []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
