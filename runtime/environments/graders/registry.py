"""The list of all graders, by the `type` of a row's `grader`. A new one is a class and a name in this union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from runtime.environments.graders.code import Function, UnitTests
from runtime.environments.graders.composed import All, Part, Weighted
from runtime.environments.graders.critic import Url
from runtime.environments.graders.function_calls import FunctionCall
from runtime.environments.graders.latex import LatexAnswer
from runtime.environments.graders.machine import Checks
from runtime.environments.graders.numeric import Numeric
from runtime.environments.graders.rubric import Rubric
from runtime.environments.graders.sql import DatabaseState, Values
from runtime.environments.graders.text import Contains, Exact, JsonSchema, Regex

AnyGrader = Annotated[
    Exact
    | Contains
    | Regex
    | JsonSchema
    | Numeric
    | LatexAnswer
    | FunctionCall
    | UnitTests
    | Function
    | Rubric
    | Url
    | DatabaseState
    | Values
    | Checks
    | All
    | Weighted,
    Field(discriminator="type"),
]
for composed in (Part, All, Weighted):
    composed.model_rebuild(_types_namespace={"AnyGrader": AnyGrader})
