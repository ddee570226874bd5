"""Model names and families: the directory of a model, and vLLM's parser for the family's tool calls.

A name is a directory, the short name of an embedded model, or a Hugging Face id, which is downloaded once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.engine.smollm2 import SMOLLM2_TITLE, locate_smollm2, make_smollm2

POCKET_MODEL = Path(__file__).parents[1] / "pocket"


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that needs no hub: it is in this project or in a package."""

    title: str
    locate: Callable[[], Path]
    """Returns its directory, which may not exist yet."""
    make: Callable[[], Path]
    """Returns its directory, and makes it first where it does not exist. Raises OSError or ValueError."""
    can_converse: bool
    """Whether it answers questions and writes prose; one that cannot plays games alone."""
    temperature: float
    """Sampling temperature in requests that set none."""
    environment: str | None = None
    """The environment that it is made to play, if it is made for one."""
    adapter: Path | None = None
    """The adapter that a new data directory starts with."""


EMBEDDED = {
    "smollm2": EmbeddedModel(
        title=SMOLLM2_TITLE,
        locate=locate_smollm2,
        make=make_smollm2,
        can_converse=True,
        adapter=Path(__file__).parents[1] / "smollm2" / "adapter",
        temperature=0.0,  # the bare model, asked for the capital of France, it says Paris in 1 of 1; at 0.7, in 7 of 16
    ),
    "pocket": EmbeddedModel(
        title="the embedded pocket model",
        locate=lambda: POCKET_MODEL,
        make=lambda: POCKET_MODEL,
        can_converse=False,
        temperature=0.7,
        environment="textworld",
    ),
}
"""By short name."""
DEFAULT_MODEL = "smollm2"
DEFAULT_TEMPERATURE = 0.7
"""Of every model that is not embedded."""

PARSERS_BY_MODEL_TYPE = {
    "qwen2": "hermes",
    "qwen2_moe": "hermes",
    "qwen3": "hermes",
    "qwen3_moe": "hermes",
    "llama": "llama3_json",
    "mistral": "mistral",
    "ministral": "mistral",
}
PARSERS_BY_ARCHITECTURE = {"Qwen": "hermes", "Llama": "llama3_json", "Mistral": "mistral", "Ministral": "mistral"}

# Beginnings of a tool call. In the text of a reply they mark a call that vLLM's parser could not read.
CALL_BEGINNINGS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")

# No pickles (*.bin, *.pt) and no *.py: loading them would run code of the repository.
NEEDED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def choose_model(configured: str | None, made_for: str | None) -> str:
    """Return the name of the model to serve: the configured one, else the one that the data directory's policies are
    made for, else the default."""
    return configured or made_for or DEFAULT_MODEL


def embedded_model(name: str) -> EmbeddedModel | None:
    """Return the embedded model of this short name or directory; None if there is none."""
    if name in EMBEDDED:
        return EMBEDDED[name]
    return next((model for model in EMBEDDED.values() if model.locate() == Path(name)), None)


def find_model(name: str) -> Path:
    """Return the directory of model `name`; download a Hugging Face id that is not cached yet.

    Raises:
        ValueError: it is neither a model directory nor of the form of a Hugging Face id.
        OSError: the hub does not know the id or cannot be reached; or the same of an embedded model's package.
    """
    embedded = embedded_model(name)
    if embedded is not None:
        return embedded.make()
    directory = Path(name).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ValueError(f"{name!r} is not a model directory: it has no config.json")
        return directory.resolve()
    # A leading point is a missing local directory: "./model" has the form of an id too.
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError(
            f"no model at {name!r}: give a directory, an id such as "
            f"Qwen/Qwen2.5-0.5B-Instruct, or one of {', '.join(EMBEDDED)}"
        )
    from huggingface_hub import (
        snapshot_download,
    )  # imported here: it takes half a second, which the pocket model does not need

    return Path(snapshot_download(name, allow_patterns=NEEDED_FILES))


def read_model_config(directory: Path) -> dict[str, Any]:
    """Return the model's config.json."""
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def parser_of_family(config: dict[str, Any]) -> str | None:
    """Return vLLM's name of the parser for the family in `config` (a config.json); None: unknown family."""
    model_type = config.get("model_type", "")
    if model_type in PARSERS_BY_MODEL_TYPE:
        return PARSERS_BY_MODEL_TYPE[model_type]
    for architecture in config.get("architectures") or []:
        for family, parser in PARSERS_BY_ARCHITECTURE.items():
            if architecture.startswith(family):
                return parser
    return None


def holds_unparsed_call(text: str) -> bool:
    """Return whether a reply's text contains a tool call that vLLM's parser could not read."""
    return any(beginning in text for beginning in CALL_BEGINNINGS)
