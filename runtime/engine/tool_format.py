"""How a model reads tools and writes calls, derived from its chat template and its tokenizer.

The architecture alone is misleading: SmolLM2 is a Llama that writes calls like Qwen, and vLLM's parser for Llama 3
fails to start with it because a token is missing. So the chat template decides first, then the tokenizer, then the
family."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import structlog

from runtime.engine.model_families import parser_of_family, read_model_config

# A text in a chat template, and the parser of the calls that the template demands. The first match counts.
PARSERS_BY_TEMPLATE = (
    ("<function=", "qwen3_coder"),
    ("<arg_key>", "glm45"),
    # After the two above, whose templates contain this text as well.
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
)
# Parsers that need a special token and do not start without it.
PARSERS_BY_TOKEN = (("<|python_tag|>", "llama3_json"), ("[TOOL_CALLS]", "mistral"))
FALLBACK = "hermes"
"""It needs no special token, and its calls are plain JSON between two marks."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "tekken.json")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)

log = structlog.get_logger()


def choose_tool_call_parser(directory: Path, template: str | None) -> str:
    """Return vLLM's name of the tool call parser for the model in `directory`, served with this chat template."""
    tokens = _read_tokens(directory)
    present = [parser for token, parser in PARSERS_BY_TOKEN if json.dumps(token) in tokens]
    lacking = {parser for _, parser in PARSERS_BY_TOKEN} - set(present)
    for mark, parser in PARSERS_BY_TEMPLATE:
        if mark in (template or "") and (parser not in lacking or not tokens):
            return parser
    if present:
        return present[0]
    family = parser_of_family(read_model_config(directory))
    if family is not None and family not in lacking:
        return family
    if family == "mistral" and not tokens:  # its tokenizer has a format that is not read here
        return family
    log.warning(
        f"nothing in the model says how it writes tool calls: reading them with {FALLBACK!r}; "
        "name another of vLLM's parsers with engine.tool_call_parser",
        model=str(directory),
    )
    return FALLBACK


def read_chat_template(directory: Path, extra_args: Sequence[str] = ()) -> str | None:
    """Return the chat template that vLLM uses for requests with tools; None if there is none.

    Raises:
        OSError: `extra_args` names a file that cannot be read.
    """
    option = _option(extra_args, "--chat-template")
    if option is not None:
        return option if "{" in option else Path(option).read_text(encoding="utf-8")
    for path in (directory / "additional_chat_templates" / "tool_use.jinja", directory / "chat_template.jinja"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    config = directory / "tokenizer_config.json"
    template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        named = {each["name"]: each["template"] for each in template}
        return named.get("tool_use", named.get("default"))
    return template


def shows_tools(template: str | None) -> bool:
    """Return whether a chat template mentions tools; one that does not would drop them silently."""
    return template is None or re.search(r"\btools\b", COMMENT.sub("", template)) is not None


def _option(arguments: Sequence[str], name: str) -> str | None:
    value = None
    for position, argument in enumerate(arguments):
        if argument == name and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif argument.startswith(f"{name}="):
            value = argument.partition("=")[2]
    return value


def _read_tokens(directory: Path) -> str:
    paths = (directory / name for name in TOKENIZER_FILES)
    return "\n".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())
