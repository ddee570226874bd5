"""Reads settings from four sources: flags override environment variables, these the TOML file, that the defaults.

The pydantic model passed in defines the sections and keys. Every value is collected under its dotted key with its
origin, so that messages on unknown keys and invalid values name where they were given.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

Settings = TypeVar("Settings", bound=BaseModel)

ENV_PREFIX = "RATCHET_"
# Options of the client commands, not settings.
ENV_OF_CLIENTS = frozenset({"RATCHET_URL", "RATCHET_KEY"})


class BadSettings(ValueError):
    """An unknown key or an invalid value; the message names it and its origin."""


@dataclass(frozen=True)
class GivenValue:
    """One value from a source."""

    key: str  # dotted: engine.model
    value: object
    origin: str  # for messages: "flag --engine.model"


def read_settings(
    kind: type[Settings],
    *,
    toml: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Settings:
    """Return settings of `kind`; flags override environment variables, these the file, that the defaults.

    Raises:
        BadSettings: an unknown key, an invalid value, a file that is missing or isn't TOML.
    """
    known = _list_keys(kind)
    layers = [*_from_toml(toml, known), *_from_environ(environ or {}), *_from_flags(flags or {})]
    return _build(kind, known, {}, layers)


def overlay(settings: Settings, changes: Mapping[str, object], *, origin: str) -> Settings:
    """Return `settings` with some values replaced; sections are nested tables. Used for the changes of one request.

    Raises:
        BadSettings: as `read_settings`.
    """
    known = _list_keys(type(settings))
    # Typed already, but strings among them pass `_parse` once more, which must leave them as they are.
    base = {given.key: given for given in _flatten(settings.model_dump(), "", "configuration", known)}
    return _build(type(settings), known, base, list(_flatten(changes, "", origin, known)))


def parse_flags(arguments: Sequence[str]) -> dict[str, str]:
    """Return `{"engine.model": "X"}` for `["--engine.model", "X"]` or `["--engine.model=X"]`.

    Raises:
        BadSettings: an argument is not `--key value`.
    """
    flags: dict[str, str] = {}
    rest = iter(arguments)
    for word in rest:
        if not word.startswith("--"):
            raise BadSettings(f"unexpected argument {word!r}; settings are given as --section.key value")
        key, has_value, value = word[2:].partition("=")
        if not has_value:
            try:
                value = next(rest)
            except StopIteration:
                raise BadSettings(f"flag --{key} needs a value") from None
        flags[key.replace("-", "_")] = value
    return flags


def read_key(setting: str, variable: str | None, environ: Mapping[str, str]) -> str | None:
    """Return the secret in the environment variable that a setting names; None where it names none.

    Raises:
        BadSettings: the variable is missing or empty.
    """
    if variable is None:
        return None
    value = environ.get(variable, "")
    if not value:
        # Quoted only where it cannot be the key itself, given by mistake.
        shown = repr(variable) if re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable) else "a variable"
        raise BadSettings(
            f"{setting} names {shown}, which is not set: it is the name of an environment variable such as "
            "OPENAI_API_KEY, never the key itself"
        )
    return value


def _build(
    kind: type[Settings], known: Mapping[str, object], base: Mapping[str, GivenValue], layers: list[GivenValue]
) -> Settings:
    values = dict(base)
    for given in layers:  # later layers override earlier ones
        _require_known(given, known)
        values[given.key] = given
    try:
        return kind.model_validate(_nest({key: _parse(given.value, known[key]) for key, given in values.items()}))
    except ValidationError as error:
        raise BadSettings(_describe(error, values)) from None


def _list_keys(kind: type[BaseModel], prefix: str = "") -> dict[str, object]:
    """Return every dotted key of the model, sections included, with its annotation."""
    keys: dict[str, object] = {}
    for name, field in kind.model_fields.items():
        # A dict of models, such as tools.mcp, stays one key; pydantic looks inside of it.
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= _list_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys[prefix + name] = field.annotation
    return keys


def _from_toml(path: Path | None, known: Mapping[str, object]) -> Iterator[GivenValue]:
    if path is None:
        return
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadSettings(f"no configuration file at {str(path)!r}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadSettings(f"{path} is not valid TOML: {error}") from None
    yield from _flatten(table, "", str(path), known)


def _flatten(
    table: Mapping[str, object], prefix: str, origin: str, known: Mapping[str, object]
) -> Iterator[GivenValue]:
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and key not in known:  # a known key may itself hold a dict
            yield from _flatten(value, f"{key}.", origin, known)
        else:
            yield GivenValue(key, value, origin)


def _from_environ(environ: Mapping[str, str]) -> Iterator[GivenValue]:
    for name, value in environ.items():
        # Two underscores separate sections, because keys contain single ones: RATCHET_SERVER__ALLOWED_HOSTS.
        if name.startswith(ENV_PREFIX) and name not in ENV_OF_CLIENTS:
            key = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            yield GivenValue(key, value, f"environment variable {name}")


def _from_flags(flags: Mapping[str, str]) -> Iterator[GivenValue]:
    for key, value in flags.items():
        yield GivenValue(key, value, f"flag --{key}")


def _require_known(given: GivenValue, known: Mapping[str, object]) -> None:
    if given.key in known:
        return
    # cutoff=0 always finds a nearest key; an empty list cannot happen.
    nearest = difflib.get_close_matches(given.key, known, n=1, cutoff=0.0)
    raise BadSettings(f"unknown setting {given.key!r} ({given.origin}); the nearest is {nearest[0]!r}")


def _parse(value: object, annotation: object) -> object:
    """Convert a string from a flag or variable to None, a list or a dict where the annotation allows it; pydantic
    converts numbers itself."""
    if not isinstance(value, str):
        return value
    options = get_args(annotation) if get_origin(annotation) not in (list, dict, tuple) else (annotation,)
    if value in ("", "null", "none") and type(None) in options:
        return None
    if any((get_origin(option) or option) in (list, dict, tuple) for option in options):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            # An item that contains a comma has to be given as JSON.
            return [part.strip() for part in value.split(",")]
    return value


def _nest(flat: Mapping[str, object]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        table = nested
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return nested


def _describe(error: ValidationError, values: Mapping[str, GivenValue]) -> str:
    problems = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        key = next(
            (".".join(path[:end]) for end in range(len(path), 0, -1) if ".".join(path[:end]) in values), ".".join(path)
        )
        origin = f" ({values[key].origin})" if key in values else ""
        problems.append(f"{key} = {problem['input']!r}{origin}: {problem['msg']}")
    return "; ".join(problems)
