"""Settings from four places, laid over one another: flags, environment, TOML file, defaults; the first to speak counts.

Refuses to know what the settings mean or which sections there are: the pydantic model handed in says so.
Flow: gather every value given, under its dotted key and with the place it came from -> refuse keys that the model
lacks, naming the nearest it has -> let the model check the values, naming key and place of a bad one.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

Settings = TypeVar("Settings", bound=BaseModel)

ENV_PREFIX = "RATCHET_"
ENV_OF_CLIENTS = frozenset({"RATCHET_URL", "RATCHET_KEY"})


class BadSettings(ValueError):
    """A key or a value that cannot be; the message names it and where it was given."""


@dataclass(frozen=True)
class Given:
    """One value that somebody wrote somewhere."""

    key: str  # dotted: engine.model
    value: Any
    place: str  # for messages: "flag --engine.model"


def read_settings(
    kind: type[Settings],
    *,
    toml: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Settings:
    """Return settings of `kind`; flags win over environment variables, these over the file, that over the defaults.

    Raises:
        BadSettings: an unknown key, a value of the wrong sort, a file that is missing or isn't TOML.
    """
    known = _list_keys(kind)
    layers = [*_from_toml(toml, known), *_from_environ(environ or {}), *_from_flags(flags or {})]
    return _build(kind, known, {}, layers)


def overlay(settings: Settings, changes: Mapping[str, Any], *, place: str) -> Settings:
    """Return `settings` with some values replaced; sections are nested tables. For changes that come with a request.

    Raises:
        BadSettings: as `read_settings`.
    """
    known = _list_keys(type(settings))
    base = {one.key: one for one in _flatten(settings.model_dump(), "", "configuration", known)}
    return _build(type(settings), known, base, list(_flatten(changes, "", place, known)))


def parse_flags(arguments: Sequence[str]) -> dict[str, str]:
    """Return `{"engine.model": "X"}` for `["--engine.model", "X"]` or `["--engine.model=X"]`.

    Raises:
        BadSettings: something that isn't `--key value`.
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


def _build(kind: type[Settings], known: Mapping[str, Any], base: Mapping[str, Given], layers: list[Given]) -> Settings:
    given = dict(base)
    for one in layers:
        _refuse_unknown(one, known)
        given[one.key] = one
    try:
        return kind.model_validate(_nest({key: _parse(one.value, known[key]) for key, one in given.items()}))
    except ValidationError as error:
        raise BadSettings(_describe(error, given)) from None


def _list_keys(kind: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Return every dotted key of the model with the type of its value; sections are walked into."""
    keys: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= _list_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys[prefix + name] = field.annotation
    return keys


def _from_toml(path: Path | None, known: Mapping[str, Any]) -> Iterator[Given]:
    if path is None:
        return
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadSettings(f"no configuration file at {str(path)!r}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadSettings(f"{path} is not valid TOML: {error}") from None
    yield from _flatten(table, "", str(path), known)


def _flatten(table: Mapping[str, Any], prefix: str, place: str, known: Mapping[str, Any]) -> Iterator[Given]:
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and key not in known:
            yield from _flatten(value, f"{key}.", place, known)
        else:
            yield Given(key, value, place)


def _from_environ(environ: Mapping[str, str]) -> Iterator[Given]:
    for name, value in environ.items():
        if name.startswith(ENV_PREFIX) and name not in ENV_OF_CLIENTS:
            key = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            yield Given(key, value, f"environment variable {name}")


def _from_flags(flags: Mapping[str, str]) -> Iterator[Given]:
    for key, value in flags.items():
        yield Given(key, value, f"flag --{key}")


def _refuse_unknown(one: Given, known: Mapping[str, Any]) -> None:
    if one.key in known:
        return
    nearest = difflib.get_close_matches(one.key, known, n=1, cutoff=0.0)
    raise BadSettings(f"unknown setting {one.key!r} ({one.place}); the nearest is {nearest[0]!r}")


def _parse(value: Any, annotation: Any) -> Any:
    """Make of a string from a flag or a variable what the model wants; pydantic reads numbers by itself."""
    if not isinstance(value, str):
        return value
    options = get_args(annotation) if get_origin(annotation) not in (list, dict, tuple) else (annotation,)
    if value in ("", "null", "none") and type(None) in options:
        return None
    if any((get_origin(option) or option) in (list, dict, tuple) for option in options):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return [part.strip() for part in value.split(",")]
    return value


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        table = nested
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return nested


def _describe(error: ValidationError, given: Mapping[str, Given]) -> str:
    problems = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        key = next(
            (".".join(path[:end]) for end in range(len(path), 0, -1) if ".".join(path[:end]) in given), ".".join(path)
        )
        place = f" ({given[key].place})" if key in given else ""
        problems.append(f"{key} = {problem['input']!r}{place}: {problem['msg']}")
    return "; ".join(problems)
