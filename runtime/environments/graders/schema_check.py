"""The process that holds a reply to a JSON schema: `python -m runtime.environments.graders.schema_check`.

Standard input is a JSON object of the `schema` and the `texts` of which the first that is JSON counts; standard output
is the JSON of what is wrong with it, or null.
Invariant: the kernel ends it after `CPU_SECONDS` of processor time, by SIGXCPU: a `pattern` may take for ever on a
reply that was written against it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Sequence
from typing import Any

import jsonschema
import jsonschema.exceptions
import referencing
from referencing.exceptions import Unresolvable

CPU_SECONDS = 2
NICENESS = 10
"""Lower priority than the server's: requests are more urgent than rewards."""
MAX_PROBLEM_CHARS = 1_000
NOT_JSON = object()


def find_problem(schema: dict[str, Any], texts: Sequence[str]) -> str | None:
    """Return why the first text that is JSON does not fit the schema, or None if it does."""
    value = read_first(texts)
    if value is NOT_JSON:
        return "the reply is not JSON"
    # An empty registry: by default jsonschema would fetch a remote $ref from any URL.
    validator = jsonschema.Draft202012Validator(schema, registry=referencing.Registry())
    try:
        problem = jsonschema.exceptions.best_match(validator.iter_errors(value))
        return None if problem is None else f"{problem.json_path}: {problem.message}"[:MAX_PROBLEM_CHARS]
    except (Unresolvable, RecursionError) as error:
        return f"the schema cannot be applied: {error}"


def read_first(texts: Sequence[str]) -> Any:
    """Return the value of the first text that is JSON; else `NOT_JSON`."""
    for text in texts:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            continue
    return NOT_JSON


def main() -> None:
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    job = json.load(sys.stdin)
    print(json.dumps(find_problem(job["schema"], job["texts"])))


if __name__ == "__main__":
    main()
