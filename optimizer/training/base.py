"""Finds the base model's files and counts its parameters, without loading it.

Nothing is downloaded: a model that is not on this machine is an error.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any


def locate_base(base_model: str) -> Path:
    """Return the directory that holds the files of `base_model`, a directory or a Hugging Face id.

    Raises:
        ValueError: neither a directory nor a model that has been downloaded.
    """
    if Path(base_model).is_dir():
        return Path(base_model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # local_files_only: a cycle must not begin with a download of gigabytes, nor depend on the network
        return Path(snapshot_download(base_model, local_files_only=True))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"base model {base_model!r} is neither a directory nor a downloaded Hugging Face model; "
            "start the engine with it once"
        ) from error


def load_tokenizer(base_model: str) -> Any:
    """Return the tokenizer of `base_model`; blocks for seconds. Raises: ValueError."""
    from transformers import AutoTokenizer  # seconds of import

    return AutoTokenizer.from_pretrained(locate_base(base_model))


def count_parameters(base_dir: Path) -> int:
    """Return the number of parameters. Raises ValueError: the directory holds no safetensors file."""
    return sum(math.prod(shape) for shape in read_headers(base_dir).values())


def read_headers(base_dir: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor by its name, read from the headers of the safetensors files.

    Raises:
        ValueError: the directory holds no safetensors file.
    """
    files = sorted(base_dir.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{str(base_dir)!r} holds no *.safetensors file; convert the model to safetensors")
    # by name: a tensor that two files hold counts once
    return {name: entry["shape"] for file in files for name, entry in _read_header(file).items()}


def _read_header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        # safetensors: eight bytes, little-endian, give the length of the JSON header that follows
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(header_bytes))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}
