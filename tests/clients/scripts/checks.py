"""The part that all clients' scripts share. Runs in the client's own environment: standard library only."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

BASE_URL = os.environ.get("CLIENT_BASE_URL", "")
MODEL = "agent"
API_KEY = "none"
QUESTION = "Say hello to Oslo."
MAX_TOKENS = 96
EMBEDDING_MODEL = "all-MiniLM-L6-v2"
TEXTS = ("It rains in Oslo.", "The weather there is wet.", "The stock market fell.")
"""The first two are on the same subject."""
CITIES = ("Oslo", "Bergen")
CityName = Literal["Oslo", "Bergen"]
# An enumeration, not free text: the checks are of formats, and a small model may not end a text by itself.
CITY_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": list(CITIES)}},
    "required": ["city"],
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather in a city.", "parameters": CITY_SCHEMA},
}
WEATHER_QUESTION = "How is the weather in Oslo? Use the tool."


def weather(city: CityName) -> str:
    """The weather in a city."""
    return f"In {city} it rains."


class ModelLimit(Exception):
    """Raised by a check if the server answered every request correctly, but the model did not do its part.

    It applies only where the request leaves the choice to the model: a missing forced call is a failure.
    """


def expect(holds: object, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def expect_meaning(vectors: Sequence[Sequence[float]]) -> None:
    """Check the vectors of TEXTS: unit length, and the first two nearer to each other than to the third."""

    def similarity(one: Sequence[float], other: Sequence[float]) -> float:
        return sum(a * b for a, b in zip(one, other, strict=True))

    expect(len(vectors) == len(TEXTS), f"{len(vectors)} vectors")
    expect(all(abs(similarity(each, each) - 1) < 1e-3 for each in vectors), "a vector is not of unit length")
    first, second, third = vectors
    expect(similarity(first, second) > similarity(first, third), "the vectors have no meaning")


def run_checks(checks: dict[str, Callable[[], object]]) -> None:
    """Run each check and print one line of JSON for it: its name, its outcome, and the reason of a failure."""
    for name, check in checks.items():
        with ThreadPoolExecutor(1) as pool:
            error = pool.submit(check).exception()  # an exception of any kind is a result, not the end of the script
        outcome = "passed" if error is None else "model" if isinstance(error, ModelLimit) else "failed"
        reason = "" if error is None else f"{type(error).__name__}: {error}"[:400]
        print(json.dumps({"check": name, "outcome": outcome, "reason": reason}), flush=True)
    sys.stdout.flush()
    os._exit(0)  # some clients leave threads that keep the process alive
