"""All formats by name, and which of them a row is in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memory.formats import complete, instructions, openai, sharegpt, tau_bench, trl, xlam
from memory.formats.content import BadRow, ExampleContent, ExampleKind, Row

ALL_KINDS = frozenset(ExampleKind)
DEMONSTRATIONS = frozenset({ExampleKind.DEMONSTRATION})
AUTO = "auto"
"""The name that stands for the format that the rows are recognised to be in."""


@dataclass(frozen=True)
class Format:
    """One form of training data."""

    name: str
    fields: str
    """The fields of its rows, for people."""
    kinds: frozenset[ExampleKind]
    """The kinds of examples that it can hold."""
    recognise: Callable[[Row], str | None]
    """Row -> why it is in this format; None where it is not."""
    read: Callable[[Row], ExampleContent]
    """Raises BadRow."""
    write: Callable[[ExampleContent], Row]
    """Raises NotExpressible."""


FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        Format(
            "openai",
            "messages, tools / input, preferred_output, non_preferred_output",
            frozenset({ExampleKind.DEMONSTRATION, ExampleKind.PREFERENCE}),
            openai.recognise,
            openai.read,
            openai.write,
        ),
        Format(
            "trl",
            "messages, tools / prompt, completion / prompt, chosen, rejected / prompt, completion, label",
            ALL_KINDS,
            trl.recognise,
            trl.read,
            trl.write,
        ),
        Format(
            "sharegpt",
            "conversations, tools / conversations, chosen, rejected / conversations, kto_tag",
            ALL_KINDS,
            sharegpt.recognise,
            sharegpt.read,
            sharegpt.write,
        ),
        Format(
            "instruction-preference",
            "instruction, chosen, rejected",
            frozenset({ExampleKind.PREFERENCE}),
            trl.recognise_instruction,
            trl.read_instruction,
            trl.write_instruction,
        ),
        Format(
            "smart",
            "dataset_name, instruction, input, output",
            DEMONSTRATIONS,
            instructions.recognise_smart,
            instructions.read_smart,
            instructions.write_smart,
        ),
        Format(
            "alpaca",
            "instruction, input, output",
            DEMONSTRATIONS,
            instructions.recognise_alpaca,
            instructions.read_alpaca,
            instructions.write_alpaca,
        ),
        Format(
            "question-answer",
            "question, answer",
            DEMONSTRATIONS,
            instructions.recognise_answer,
            instructions.read_answer,
            instructions.write_answer,
        ),
        Format("xlam", "query, answers, tools", DEMONSTRATIONS, xlam.recognise, xlam.read, xlam.write),
        Format(
            "tau-bench",
            "task_id, reward, traj",
            DEMONSTRATIONS,
            tau_bench.recognise,
            tau_bench.read,
            tau_bench.write,
        ),
        Format(
            "ratchet",
            "kind, prompt, completion, rejected, is_good, reward, tools, task",
            ALL_KINDS,
            complete.recognise,
            complete.read,
            complete.write,
        ),
    )
}


def find_format(name: str) -> Format:
    """Return the format called `name`. Raises: ValueError that names all of them."""
    if name not in FORMATS:
        raise ValueError(f"no format is called {name!r}: use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def require_holds(format_: Format, kind: ExampleKind) -> None:
    """Raise ValueError for a format that cannot hold examples of a kind."""
    if kind not in format_.kinds:
        others = ", ".join(other.name for other in FORMATS.values() if kind in other.kinds)
        raise ValueError(f"the format {format_.name!r} cannot hold a {kind.value}: use one of {others}")


def recognise_row(row: Row) -> tuple[Format, str]:
    """Return the format that a row is in, and why.

    Raises: BadRow where it is in none, and where it may be in several.
    """
    match = _match_row(row)
    if match is None:
        known = "; ".join(f"{each.name}: {each.fields}" for each in FORMATS.values())
        raise BadRow(f"the row with the fields {', '.join(map(repr, list(row)[:12]))} is in no known format ({known})")
    return match


def _match_row(row: Row) -> tuple[Format, str] | None:
    matches = [(each, why) for each in FORMATS.values() if (why := each.recognise(row)) is not None]
    if len(matches) > 1:
        names = ", ".join(f"{each.name} ({why})" for each, why in matches)
        raise BadRow(f"the row may be of several formats: {names}; name one")
    return matches[0] if matches else None


def recognise_rows(rows: Sequence[Row]) -> tuple[Format, str]:
    """Return the format of rows, and why the first of them is in it. Rows of no format are passed over: they are errors
    of their own.

    Raises: BadRow where rows are in different formats, one may be in several, or all are in none.
    """
    found: tuple[Format, str] | None = None
    for number, row in enumerate(rows, start=1):
        match = _match_row(row)
        if match is None:
            continue
        found = found or match
        if match[0] is not found[0]:
            (first, why), (other, other_why) = found, match
            raise BadRow(
                f"one row is {first.name} ({why}) and row {number} is {other.name} ({other_why}): name the format, or "
                "split the file"
            )
    return found or recognise_row(rows[0])


def write_row(content: ExampleContent, target: Format, *, source: str | None = None) -> Row:
    """Return an example as a row of a format; `source` is the format that it was read from.

    Raises: NotExpressible.
    """
    # fields of another format's rows may mean something else here
    kept = content if source == target.name else dataclasses.replace(content, extra={})
    return target.write(kept)
