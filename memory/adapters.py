"""Adapter directories on disk: written atomically, and verified before an engine loads them.

A directory holds `adapter_config.json`, `adapter_model.safetensors` and `manifest.json`, and nothing else. Files are
read as bytes; nothing in them is executed.

Invariants: an adapter directory is immutable and its name never reused. An adapter that passes `verify_adapter` is a
plain LoRA (Hu et al., arXiv 2106.09685) in safetensors, of bounded rank, finite, not a no-op, made for this base model,
and equal to its manifest's digests byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy
from pydantic import BaseModel, Field, ValidationError

from memory.errors import AdapterRefused
from memory.names import Name

MANIFEST_NAME = "manifest.json"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FILE_NAMES = frozenset({MANIFEST_NAME, CONFIG_NAME, WEIGHTS_NAME})
# Bounds on the memory that a hostile or damaged file can take.
MAX_JSON_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 16 * 2**20
BLOCK_BYTES = 2**20
# numpy has no bfloat16: its bits are read as integers.
NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
BF16_EXPONENT = 0x7F80  # all bits set: infinite or not a number
BF16_SIGN = 0x8000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")


class Fingerprint(BaseModel, extra="forbid"):
    """Log-probabilities of some tokens in the trainer, which an engine that serves the adapter must reproduce."""

    token_ids: list[int] = Field(default_factory=list)
    base_logprobs: list[float] = Field(default_factory=list)
    adapter_logprobs: list[float] = Field(default_factory=list)


class Manifest(BaseModel, extra="forbid"):
    """The description of an adapter: its origin and the digests of its files. The trainer writes it."""

    format: Literal[1] = 1
    name: Name
    version: int = Field(ge=0)
    base_model: str
    base_digest: str
    tokenizer_digest: str = ""
    chat_template_digest: str = ""
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of every file but the manifest, by name."""
    trajectory_ids: list[str] = Field(default_factory=list)
    """The trajectories of its training data."""
    parent: int | None = None
    kind: str
    """The method of learning: "sft", "dpo"."""
    seeds: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    fingerprint: Fingerprint = Field(default_factory=Fingerprint)


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Write the manifest with the digests of the directory's files; return it. The last step before the move."""
    files = {path.name: digest_file(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST_NAME}
    manifest = manifest.model_copy(update={"files": files})
    (directory / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def write_adapter_atomically(temporary: Path, final: Path) -> Path:
    """Move a finished directory to its final name; after any crash it exists completely or not at all.

    Both paths must be on one filesystem. Raises: FileExistsError when the name was used before; FileNotFoundError
    without a manifest.
    """
    if not (temporary / MANIFEST_NAME).is_file():
        raise FileNotFoundError(f"{str(temporary)!r} has no {MANIFEST_NAME}: write it before the adapter is moved")
    # checked here, because rename(2) replaces an empty directory without an error; a full one makes it fail
    if final.exists():
        raise FileExistsError(f"{str(final)!r} exists: adapters are immutable, take a new version")
    final.parent.mkdir(parents=True, exist_ok=True)
    # The contents must be durable before the rename, and the rename before the return.
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    temporary.rename(final)
    _sync(final.parent)
    return final


def read_manifest(directory: Path) -> Manifest:
    """Return an adapter's manifest without verifying the files. Raises: AdapterRefused."""
    path = directory / MANIFEST_NAME
    try:
        return Manifest.model_validate(_read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise AdapterRefused(f"{str(path)!r} is not a manifest: {field}: {first['msg']}") from error


def verify_adapter(directory: Path, *, base_digest: str, max_rank: int) -> Manifest:
    """Verify an adapter; return its manifest. Raises: AdapterRefused with the file and the reason."""
    _verify_files(directory)
    manifest = read_manifest(directory)
    if manifest.base_digest != base_digest:
        raise AdapterRefused(
            f"{str(directory)!r} was made for base {manifest.base_model!r} ({manifest.base_digest[:12]}), "
            f"not for the one that is served ({base_digest[:12]}): train it again on that base"
        )
    # order: links and foreign files are excluded before any file is opened, and the bytes vouched for before they are
    # parsed
    _verify_hashes(directory, manifest)
    config = _read_json(directory / CONFIG_NAME)
    _verify_config(directory / CONFIG_NAME, config, max_rank)
    _verify_weights(directory / WEIGHTS_NAME, max_rank)
    return manifest


def digest_file(path: Path) -> str:
    """Return a file's SHA-256, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_adapter(directory: Path) -> str:
    """Return the SHA-256 of an adapter: that of its manifest, which holds the digests of the other files."""
    return digest_file(directory / MANIFEST_NAME)


def digest_base(directory: Path | str) -> str:
    """Return the digest of a base model: of its configuration, and of its weight files' names and sizes.

    The weights are not read, because that would be gigabytes at every start. Raises: FileNotFoundError for a directory
    without a model.
    """
    directory = Path(directory)
    config = directory / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{str(directory)!r} holds no config.json: give the directory of a model")
    weights = sorted((path.name, path.stat().st_size) for path in directory.glob("*.safetensors"))
    description = json.dumps([_canonical(config), weights])
    return hashlib.sha256(description.encode()).hexdigest()


def digest_tokenizer(directory: Path | str) -> str:
    """Return the digest of a tokenizer's vocabulary files."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = Path(directory) / name
        if path.is_file():
            digest.update(f"{name}:{digest_file(path)}\n".encode())
    return digest.hexdigest()


def digest_chat_template(template: str) -> str:
    """Return the digest of a chat template's text."""
    return hashlib.sha256(template.encode()).hexdigest()


def _verify_files(directory: Path) -> None:
    if ".." in directory.parts:
        raise AdapterRefused(f"{str(directory)!r} leads through '..': give the adapter's own directory")
    if directory.is_symlink() or not directory.is_dir():
        raise AdapterRefused(f"{str(directory)!r} is not a directory: give the directory of an adapter")
    present = set()
    for path in directory.iterdir():
        # A link's target may change after the verification.
        if path.is_symlink() or not path.is_file():
            raise AdapterRefused(f"{str(path)!r} is not a plain file: adapters hold no links and no directories")
        if path.name not in FILE_NAMES:
            raise AdapterRefused(f"{str(path)!r} does not belong in an adapter: it holds {sorted(FILE_NAMES)!r} only")
        present.add(path.name)
    if missing := sorted(FILE_NAMES - present):
        raise AdapterRefused(f"{str(directory)!r} lacks {missing[0]!r}: an adapter holds {sorted(FILE_NAMES)!r}")


def _verify_hashes(directory: Path, manifest: Manifest) -> None:
    expected = FILE_NAMES - {MANIFEST_NAME}
    if manifest.files.keys() != expected:
        raise AdapterRefused(
            f"the manifest of {str(directory)!r} vouches for {sorted(manifest.files)!r}, not for {sorted(expected)!r}"
        )
    for name, digest in manifest.files.items():
        if digest_file(directory / name) != digest:
            raise AdapterRefused(
                f"{str(directory / name)!r} is not the file its manifest vouches for: restore or retrain it"
            )


def _verify_config(path: Path, config: object, max_rank: int) -> None:
    if not isinstance(config, dict):
        raise AdapterRefused(f"{str(path)!r} is not a JSON object")
    if config.get("peft_type") != "LORA":
        raise AdapterRefused(f"{str(path)!r}: peft_type is {config.get('peft_type')!r}, not 'LORA'")
    unsupported = {"use_dora": False, "bias": "none", "modules_to_save": None, "use_rslora": False, "lora_bias": False}
    for name, allowed in unsupported.items():
        # absent, null and false all mean the default
        if (config.get(name) or allowed) != allowed:
            raise AdapterRefused(f"{str(path)!r}: {name} is {config[name]!r}: the engine serves plain LoRA only")
    # `rank_pattern` overrides `r` for single layers.
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    for rank in ranks:
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= max_rank:
            raise AdapterRefused(
                f"{str(path)!r}: rank {rank!r} is not from 1 to {max_rank}, which the engine was started for"
            )


def _verify_weights(path: Path, max_rank: int) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        header, start = _read_header(path, file, size)
        tensors = {name: spec for name, spec in header.items() if name != "__metadata__"}
        _verify_layout(path, tensors, size - start, max_rank)
        is_no_op = True
        for name, spec in tensors.items():
            file.seek(start + spec["data_offsets"][0])
            is_zero = _verify_tensor(path, name, spec, file)
            # lora_B begins at zero: left so, it cancels lora_A whatever that holds.
            is_no_op = is_no_op and (is_zero or ".lora_B" not in name)
    if is_no_op:
        raise AdapterRefused(f"{str(path)!r}: every lora_B is zero: the adapter changes nothing, train it again")


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """Return a safetensors header and the offset of the data: 8 bytes of length, then JSON of that length."""
    prefix = file.read(8)
    # The length is not trusted: reading that many bytes could exhaust the memory.
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise AdapterRefused(f"{str(path)!r} is truncated or not safetensors: its header would have {length} bytes")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise AdapterRefused(f"{str(path)!r} is not safetensors: its header is not JSON") from error
    if not isinstance(header, dict):
        raise AdapterRefused(f"{str(path)!r} is not safetensors: its header is not a JSON object")
    return header, 8 + length


def _verify_layout(path: Path, tensors: Mapping[str, Any], num_bytes: int, max_rank: int) -> None:
    """Check names, types and shapes, and that the tensors fill the file without gaps, overlaps or a remainder."""
    spans = []
    for name, spec in tensors.items():
        try:
            dtype, shape, (begin, end) = spec["dtype"], [int(dim) for dim in spec["shape"]], spec["data_offsets"]
            item_bytes = numpy.dtype(NUMPY_TYPES[dtype]).itemsize
            is_whole = int(end) - int(begin) == item_bytes * _product(shape) and int(begin) >= 0 and min(shape) > 0
        except (KeyError, TypeError, ValueError) as error:
            raise AdapterRefused(
                f"{str(path)!r}: tensor {name!r} is not described as a float tensor: {spec!r}"
            ) from error
        if not is_whole:
            raise AdapterRefused(f"{str(path)!r}: tensor {name!r} has the wrong size for its shape {shape!r}")
        is_a, is_b = ".lora_A" in name or ".lora_embedding_A" in name, ".lora_B" in name or ".lora_embedding_B" in name
        if is_a == is_b or len(shape) != 2:
            raise AdapterRefused(f"{str(path)!r}: tensor {name!r} is not part of a plain LoRA")
        # lora_A is (rank, in), lora_B is (out, rank).
        if min(shape) > max_rank:
            raise AdapterRefused(f"{str(path)!r}: tensor {name!r} has rank {min(shape)}, over the engine's {max_rank}")
        # Bytes, relative to the end of the header.
        spans.append((int(begin), int(end)))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise AdapterRefused(f"{str(path)!r}: its tensors overlap or leave gaps at byte {position}")
        position = end
    if position != num_bytes:
        raise AdapterRefused(f"{str(path)!r} is truncated or padded: {num_bytes} bytes of data, {position} described")


def _verify_tensor(path: Path, name: str, spec: Mapping[str, Any], file: BinaryIO) -> bool:
    """Check that all numbers are finite; return whether all are zero. Reads in blocks: adapters may be large."""
    dtype, left, is_zero = spec["dtype"], spec["data_offsets"][1] - spec["data_offsets"][0], True
    while left:
        block = file.read(min(left, BLOCK_BYTES))
        if not block:
            raise AdapterRefused(f"{str(path)!r} is truncated within tensor {name!r}")
        left -= len(block)
        values = numpy.frombuffer(block, dtype=NUMPY_TYPES[dtype])
        if dtype == "BF16":
            is_finite = bool(((values & BF16_EXPONENT) != BF16_EXPONENT).all())
            is_zero = is_zero and not (values & ~numpy.uint16(BF16_SIGN)).any()
        else:
            is_finite = bool(numpy.isfinite(values).all())
            is_zero = is_zero and not values.any()
        if not is_finite:
            raise AdapterRefused(f"{str(path)!r}: tensor {name!r} is not finite: training diverged, train it again")
    return is_zero


def _read_json(path: Path) -> object:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise AdapterRefused(f"{str(path)!r} is too large to be what it should be")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise AdapterRefused(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterRefused(f"{str(path)!r} is not JSON: {error}") from error


def _canonical(path: Path) -> str:
    return json.dumps(json.loads(path.read_text(encoding="utf-8")), sort_keys=True)


def _product(shape: list[int]) -> int:
    product = 1
    for dim in shape:
        product *= dim
    return product


def _sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
