"""How often the grader of function calls agrees with the leaderboard's own checker, on the leaderboard's data.

    PYTHONPATH=/where/bfcl-eval/is/unpacked python -m tests.bench.bfcl_agreement DIRECTORY_OF_BFCL [--tries 4]

Every task's accepted answers are generated, and changed in the ways that models get calls wrong: names, missing and
extra arguments, types, values, spellings, order, number of calls. Both grade each; disagreements are printed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from runtime.environments.converters.bfcl import to_name, to_tool
from runtime.environments.converters.published import read_json_lines
from runtime.environments.graders.base import Call
from runtime.environments.graders.function_calls import find_problem

CATEGORIES = (
    *("simple_python", "multiple", "parallel", "parallel_multiple"),
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"),
)
"""Files that are missing are skipped."""
OTHER_VALUES: tuple[Any, ...] = ("", "other", 0, 1, 7, -3.5, 2.0, True, False, None, [], ["x"], [1, 2], {}, {"a": 1})

Arguments = dict[str, Any]
Calls = list[tuple[str, Arguments]]
Check = Callable[[dict[str, Any], Calls, str], bool]
"""(row of the leaderboard with its answers, calls, category) -> the checker's verdict."""


def load_checker() -> Check:
    """Return the checker of the package `bfcl-eval`. Raises: ImportError if it is not installed."""
    # Its list of models imports the clients of a dozen vendors; the checker reads one flag of it.
    models = ModuleType("bfcl_eval.constants.model_config")
    models.MODEL_CONFIG_MAPPING = {"any": SimpleNamespace(underscore_to_dot=True)}  # type: ignore[attr-defined]
    importlib.import_module("bfcl_eval.constants")
    sys.modules.setdefault("bfcl_eval.constants.model_config", models)
    for language in ("java", "js"):  # these parse with tree-sitter, and no answer here is Java or JavaScript
        name = f"bfcl_eval.eval_checker.ast_eval.type_convertor.{language}_type_converter"
        converter = ModuleType(name)
        setattr(converter, f"{language}_type_converter", None)
        sys.modules.setdefault(name, converter)
    checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
    python = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON

    def check(row: dict[str, Any], calls: Calls, category: str) -> bool:
        output = [{name: arguments} for name, arguments in calls]
        return checker.ast_checker(row["function"], output, row["answers"], python, category, "any")["valid"]

    return check


def grade(row: dict[str, Any], calls: Calls) -> bool:
    """Return our own verdict."""
    expected = [{to_name(name): arguments for name, arguments in call.items()} for call in row["answers"]]
    tools = [to_tool(function) for function in row["function"]]
    return find_problem([Call(name, arguments) for name, arguments in calls], expected, tools) is None


def accepted_calls(row: dict[str, Any], rng: random.Random) -> Calls:
    """Return one of the accepted answers of a row."""
    return [
        (to_name(name), {key: _pick(values, rng) for key, values in arguments.items() if _is_given(values, rng)})
        for call in row["answers"]
        for name, arguments in call.items()
    ]


def _is_given(values: Any, rng: random.Random) -> bool:
    values = values if isinstance(values, list) else [values]  # a few answers have a bare value inside of an object
    return any(each != "" for each in values) and not ("" in values and rng.random() < 0.5)


def _pick(values: Any, rng: random.Random) -> Any:
    values = values if isinstance(values, list) else [values]
    value = rng.choice([each for each in values if each != ""] or values)
    return _pick_inside(value, rng)


def _pick_inside(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict):
        return {key: _pick(values, rng) for key, values in value.items() if _is_given(values, rng)}
    if isinstance(value, list):
        return [_pick_inside(each, rng) if isinstance(each, dict) else each for each in value]
    return value


def changed_calls(row: dict[str, Any], calls: Calls, rng: random.Random) -> Iterator[tuple[str, Calls]]:
    """Yield (name of the change, changed answer)."""
    names = [to_name(function["name"]) for function in row["function"]]
    position = rng.randrange(len(calls))
    name, arguments = calls[position]

    def replaced(other: str, changed: Arguments) -> Calls:
        return [*calls[:position], (other, changed), *calls[position + 1 :]]

    yield "other name", replaced(rng.choice([each for each in names if each != name] or ["other"]), arguments)
    yield "dots in the name", replaced(name.replace("_", "."), arguments)
    yield "no call", []
    yield "one call less", [*calls[:position], *calls[position + 1 :]]
    yield "a call twice", [*calls, calls[position]]
    yield "other order", rng.sample(calls, len(calls))
    yield "an argument more", replaced(name, {**arguments, "unheard_of": rng.choice(OTHER_VALUES)})
    schema = next(function for function in row["function"] if to_name(function["name"]) == name)["parameters"]
    for key in sorted(set(schema["properties"]) - set(arguments)):
        yield "an optional argument", replaced(name, {**arguments, key: rng.choice(OTHER_VALUES)})
    for key, value in arguments.items():
        rest = {other: each for other, each in arguments.items() if other != key}
        yield "an argument less", replaced(name, rest)
        for change, changed in _changed_values(value, rng):
            yield change, replaced(name, {**arguments, key: changed})


def _changed_values(value: Any, rng: random.Random) -> Iterator[tuple[str, Any]]:
    yield "any other value", rng.choice(OTHER_VALUES)
    yield "in a list", [value]
    yield "as text", str(value)
    if isinstance(value, str):
        yield from (("upper case", value.upper()), ("lower case", value.lower()), ("more spaces", f" {value} "))
        yield "other punctuation", value.replace(" ", "-").replace(",", "")
        yield from (("other quotes", value.replace("'", '"')), ("cut text", value[:-1]), ("a full stop", f"{value}."))
        yield "colon", f"{value}:"
    elif isinstance(value, bool):
        yield from (("not", not value), ("bool as int", int(value)))
    elif isinstance(value, int | float):
        yield from (("one more", value + 1), ("as float", float(value)), ("as int", int(value)))
    elif isinstance(value, list):
        yield from (("reversed", value[::-1]), ("an item less", value[1:]), ("an item more", [*value, *value[:1]]))
        yield "items as text", [str(each) for each in value]
        if value:
            for change, changed in _changed_values(value[0], rng):
                yield f"item: {change}", [changed, *value[1:]]
    elif isinstance(value, dict):
        yield "a key more", {**value, "unheard_of": 1}
        for key in value:
            yield "a key less", {other: each for other, each in value.items() if other != key}
            for change, changed in _changed_values(value[key], rng):
                yield f"in an object: {change}", {**value, key: changed}


def compare(directory: Path, check: Check, *, num_tries: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Return counts and descriptions of the disagreements.

    Counts: `n`, `agree`, `accepted` by the checker, `crashed` (its own errors, left out of `n`), `n <category>`.
    """
    counts, disagreements = Counter[str](), list[str]()
    for category in CATEGORIES:
        path = directory / f"BFCL_v4_{category}.json"
        if not path.exists():
            continue
        answers = {
            row["id"]: row["ground_truth"] for row in read_json_lines(path.parent / "possible_answer" / path.name)
        }
        for row in read_json_lines(path):
            row["answers"] = answers[row["id"]]
            rng = random.Random(f"{seed}/{row['id']}")
            for _ in range(num_tries):
                calls = accepted_calls(row, rng)
                for change, changed in [("accepted", calls), *changed_calls(row, calls, rng)]:
                    try:
                        expected = check(row, changed, category)
                    except (TypeError, AttributeError, KeyError) as error:  # a bug of the checker
                        counts[f"crashed: {type(error).__name__}"] += 1
                        continue
                    agrees = grade(row, changed) == expected
                    counts.update({"n": 1, f"n {category}": 1, "agree": agrees, "accepted": expected})
                    if not agrees:
                        disagreements.append(f"{row['id']}, {change}: checker {expected}: {json.dumps(changed)}")
    return counts, disagreements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tries", type=int, default=4)
    arguments = parser.parse_args()
    counts, disagreements = compare(arguments.directory, load_checker(), num_tries=arguments.tries)
    for line in disagreements[:50]:
        print(line)
    print(json.dumps(dict(sorted(counts.items())), indent=2))
    print(f"agreement {counts['agree'] / counts['n']:.4%} of {counts['n']} answers")


if __name__ == "__main__":
    main()
