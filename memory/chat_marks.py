"""Breaks chat markers in text of others with a space, so that no tokenizer reads a special token in it.

`ChatMarks` has the tokens of one tokenizer, read from its files, and is applied to every prompt on its way to the
engine. `neutralise` breaks the markers of all model families, for text that outlives a model: memories, web pages and
the output of MCP servers.

Invariant: only spaces are added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_LOOKALIKES = "memory|tool_call|tool_response|tools|think|function_calls"
_CONTROLS = "s|inst|sys|bos|eos|pad|unk|start_of_turn|end_of_turn|start_of_image|end_of_image|sop|eop"
_BRACKETED = (
    "inst|system_prompt|available_tools|tool_calls|tool_results|tool_content|args|call_id|think|img|img_break|img_end|"
    "audio|begin_audio|prefix|middle|suffix|gmask|smask"
)
CHAT_TAGS = re.compile(
    # Possessive quantifiers: two `\s*` in a row take quadratic time over a long run of spaces.
    rf"<(?=\s*+/?\s*+(?:{_LOOKALIKES}|{_CONTROLS})\s*+>)|\[(?=\s*+/?\s*+(?:{_BRACKETED})\s*+\])",
    re.IGNORECASE,
)
CONTROL_TAGS = re.compile(rf"<(?=/?(?:{_CONTROLS})>)|\[(?=/?(?:{_BRACKETED})\])", re.IGNORECASE)
BARS = re.compile(r"<(?=[|\uff5c])|[|\uff5c](?=>)")
"""In markers such as `<|im_start|>`; DeepSeek's bars are full-width."""
A_TAG = re.compile(r"[<\[][^\s<>\[\]]{1,60}[>\]]")
OWN_TAGS = frozenset({"<memory>", "</memory>"})
"""The frame of the memory segment, which this program itself writes into a user's message."""
EXACT_ROLES = frozenset({"assistant", "system", "developer"})
"""Roles whose tags stay unless they are control tokens: a model's thoughts, and instructions about a format."""


def neutralise(text: str) -> str:
    """Break every chat marker of any family in a text, and every tag that would close the memory segment."""
    return _put_spaces(CHAT_TAGS, _put_spaces(BARS, text))


def _put_spaces(marks: re.Pattern[str], text: str) -> str:
    return marks.sub(lambda mark: f"{mark.group()} ", text)


class _Breaker:
    """Breaks a set of markers in time linear in the text, whatever their number: their prefixes form a tree."""

    def __init__(self, marks: Iterable[str]) -> None:
        self.marks = sorted({mark for mark in marks if len(mark) > 1})
        self._firsts = sorted({mark[0] for mark in self.marks})
        self._pattern = re.compile(_pattern_of(self.marks)) if self.marks else None

    def break_marks(self, text: str) -> str:
        """Return the text with a space behind the first character of every marker."""
        if self._pattern is None or not any(first in text for first in self._firsts):
            return text
        while True:  # breaking one marker may leave another that overlapped it
            broken = self._pattern.sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}", text)
            if broken == text:
                return text
            text = broken


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
        return [
            _map_texts(message, (self._special if message.get("role") in EXACT_ROLES else self._all).break_marks)
            for message in messages
        ]

    def clean(self, value: T) -> T:
        """Return a JSON value, such as tool definitions, with the markers in all its texts broken."""
        return _map_texts(value, self._all.break_marks)


class _AnyChatMarks(ChatMarks):
    """The markers of all families, for a tokenizer whose files are not at hand."""

    def __init__(self) -> None:
        super().__init__(())

    def clean_messages(self, messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        def clean_exact(text: str) -> str:
            return _put_spaces(CONTROL_TAGS, _put_spaces(BARS, text))

        def clean_others(text: str) -> str:
            frame = re.split(r"(</?memory>)", text)  # this program's own frame stays
            return "".join(part if part in OWN_TAGS else neutralise(part) for part in frame)

        return [
            _map_texts(message, clean_exact if message.get("role") in EXACT_ROLES else clean_others)
            for message in messages
        ]

    def clean(self, value: T) -> T:
        return _map_texts(value, neutralise)


ANY_FAMILY = _AnyChatMarks()


def _map_texts(value: object, change: Callable[[str], str]) -> Any:
    """Apply `change` to every text and key in a JSON value."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            change(key) if isinstance(key, str) else key: _map_texts(inside, change) for key, inside in value.items()
        }
    if isinstance(value, list | tuple):
        return [_map_texts(inside, change) for inside in value]
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
