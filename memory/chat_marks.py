"""Marks of the chat in text that others wrote: broken by a space, so that no tokenizer reads a special token in it.

`ChatMarks` knows the tokens of one tokenizer, from its files, and is applied where a prompt leaves for the engine, to
everything in it. `neutralise` knows the marks of all families by their names, for text that outlives a model: what
memory shows, and what web pages and MCP servers say.

Invariant: only spaces are added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_LOOKALIKES = "memory|tool_call|tool_response|tools|think|function_calls"
_CONTROLS = "s|inst|sys|bos|eos|pad|unk|start_of_turn|end_of_turn|start_of_image|end_of_image|sop|eop"
_BRACKETED = (
    "inst|system_prompt|available_tools|tool_calls|tool_results|tool_content|args|call_id|think|img|img_break|img_end|"
    "audio|begin_audio|prefix|middle|suffix|gmask|smask"
)
CHAT_TAGS = re.compile(
    # Possessive: over a long run of spaces two `\s*` in a row take quadratic time.
    rf"<(?=\s*+/?\s*+(?:{_LOOKALIKES}|{_CONTROLS})\s*+>)|\[(?=\s*+/?\s*+(?:{_BRACKETED})\s*+\])",
    re.IGNORECASE,
)
CONTROL_TAGS = re.compile(rf"<(?=/?(?:{_CONTROLS})>)|\[(?=/?(?:{_BRACKETED})\])", re.IGNORECASE)
BARS = re.compile(r"<(?=[|\uff5c])|[|\uff5c](?=>)")
"""Of `<|im_start|>` and its kin; DeepSeek's are full-width."""
A_TAG = re.compile(r"[<\[][^\s<>\[\]]{1,60}[>\]]")
OWN_TAGS = frozenset({"<memory>", "</memory>"})
"""Written by this program into a user's message: the frame of what memory shows."""
EXACT_ROLES = frozenset({"assistant", "system", "developer"})
"""In their messages a tag that is no control token stays: a model's thoughts, and instructions about a format."""


def neutralise(text: str) -> str:
    """Break whatever in a text would mean something to the chat of any family, or close the segment of memory."""
    return _put_spaces(CHAT_TAGS, _put_spaces(BARS, text))


def _put_spaces(marks: re.Pattern[str], text: str) -> str:
    return marks.sub(lambda mark: f"{mark.group()} ", text)


class _Breaker:
    """Finds marks in linear time, however many there are: their common beginnings are compared once."""

    def __init__(self, marks: Iterable[str]) -> None:
        self.marks = sorted({mark for mark in marks if len(mark) > 1})
        self._firsts = sorted({mark[0] for mark in self.marks})
        self._pattern = re.compile(_pattern_of(self.marks)) if self.marks else None

    def break_marks(self, text: str) -> str:
        if self._pattern is None or not any(first in text for first in self._firsts):
            return text
        while True:
            broken = self._pattern.sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}", text)
            if broken == text:
                return text
            text = broken


def _pattern_of(marks: Sequence[str]) -> str:
    """Return a regular expression for any of `marks`, written as the tree of their beginnings."""
    by_first: dict[str, list[str]] = {}
    for mark in marks:
        by_first.setdefault(mark[:1], []).append(mark[1:])
    # A mark that ends here comes last: a longer one that goes on from it is found first.
    ends_here = "" in by_first
    branches = [re.escape(first) + _pattern_of(rests) for first, rests in by_first.items() if first]
    if not branches:
        return ""
    together = branches[0] if len(branches) == 1 and not ends_here else f"(?:{'|'.join(branches)})"
    return f"{together}?" if ends_here else together


class ChatMarks:
    """The marks of one tokenizer: `special` tokens steer the chat, `tags` are added tokens that only look like it."""

    def __init__(self, special: Iterable[str], tags: Iterable[str] = ()) -> None:
        self._special = _Breaker(special)
        self._all = _Breaker([*self._special.marks, *tags])

    @classmethod
    def read(cls, directory: Path | None) -> ChatMarks | None:
        """Return the marks of the tokenizer in a directory; None where its files say nothing."""
        found = _read_added_tokens(directory) if directory is not None else {}
        if not found:
            return None
        tags = {token for token, is_special in found.items() if not is_special and A_TAG.fullmatch(token)}
        return cls((token for token, is_special in found.items() if is_special), tags - OWN_TAGS)

    def clean_messages(self, messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return messages in which nothing that anybody wrote is a special token."""
        return [
            _map_texts(message, (self._special if message.get("role") in EXACT_ROLES else self._all).break_marks)
            for message in messages
        ]

    def clean(self, value: Any) -> Any:
        """Return definitions of tools, or anything else made of texts, with their marks broken."""
        return _map_texts(value, self._all.break_marks)


class _AnyChatMarks(ChatMarks):
    """The marks of all families, where the tokenizer's files are elsewhere."""

    def __init__(self) -> None:
        super().__init__(())

    def clean_messages(self, messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        def clean_exact(text: str) -> str:
            return _put_spaces(CONTROL_TAGS, _put_spaces(BARS, text))

        def clean_others(text: str) -> str:
            frame = re.split(r"(</?memory>)", text)  # this program's own, which only stored text must not close
            return "".join(part if part in OWN_TAGS else neutralise(part) for part in frame)

        return [
            _map_texts(message, clean_exact if message.get("role") in EXACT_ROLES else clean_others)
            for message in messages
        ]

    def clean(self, value: Any) -> Any:
        return _map_texts(value, neutralise)


ANY_FAMILY = _AnyChatMarks()


def _map_texts(value: Any, change: Any) -> Any:
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
    """Return each added token and whether it is special, of every file in which tokenizers keep them."""
    found: dict[str, bool] = {}
    told = [_read_json(directory / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    added = list(_read_json(directory / "tokenizer.json").get("added_tokens") or [])
    for each in told:
        added += (each.get("added_tokens_decoder") or {}).values()
    for token in added:
        found[token["content"]] = found.get(token["content"], False) or bool(token.get("special"))
    special = [
        token
        for each in told
        for name, value in each.items()
        if name.endswith(("_token", "special_tokens"))
        for token in _tokens_in(value)
    ]
    mistral = _read_json(directory / "tekken.json").get("special_tokens") or []
    return found | dict.fromkeys([*special, *(token["token_str"] for token in mistral)], True)


def _tokens_in(value: Any) -> list[str]:
    """Return the tokens that a setting such as `eos_token` or `additional_special_tokens` names."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return _tokens_in(value["content"]) if "content" in value else _tokens_in(list(value.values()))
    return [token for each in value for token in _tokens_in(each)] if isinstance(value, list) else []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
