"""Functions as tools: their schema, their result, their import."""

from __future__ import annotations

import dataclasses
import sys
from datetime import date

import pytest
from pydantic import BaseModel

from runtime.errors import ToolRefused
from runtime.tools.base import run_tool
from runtime.tools.functions import functions_at, tool_from_function
from tests.runtime.tools.functions import find_train


class Address(BaseModel):
    street: str
    number: int = 1


@dataclasses.dataclass
class Parcel:
    to: str
    on: date


def send_parcel(address: Address, json: list[str], _model_copy: bool = False) -> Parcel:
    """Send a parcel; its parameters have names that pydantic would rather keep to itself."""
    return Parcel(f"{address.street} {address.number}, {json[0]}, {_model_copy}", date(2026, 11, 22))


def test_type_hints_and_docstring_become_the_schema():
    function = tool_from_function(find_train).definition()["function"]
    assert (function["name"], function["description"]) == ("find_train", "Find the next train.")
    properties = function["parameters"]["properties"]
    assert properties["origin"] == {"type": "string", "description": "where to board, by its full name"}
    assert properties["comfort"]["enum"] == ["plain", "quiet"]
    assert function["parameters"]["required"] == ["origin"]


def test_a_parameter_without_a_type_is_refused_by_name():
    def shout(text):
        """Shout."""

    with pytest.raises(ValueError, match="parameter 'text' has no type hint"):
        tool_from_function(shout)
    with pytest.raises(ValueError, match="'rest' has no name in JSON"):
        tool_from_function(lambda *rest: None, name="any")


def test_a_type_that_json_has_no_word_for_is_refused():
    def keep(lock: type[BaseException], when: object()) -> None:
        """Keep."""

    with pytest.raises(ValueError, match="tool 'keep': its type hints make no"):
        tool_from_function(keep)


async def test_models_and_odd_names_arrive_as_declared_and_results_are_shown_as_json():
    result = await run_tool(tool_from_function(send_parcel), '{"address": {"street": "Elm"}, "json": ["x"]}')
    assert result.content == '{"to":"Elm 1, x, False","on":"2026-11-22"}'


async def test_bytes_are_an_error_and_a_circle_is_cut_open():
    def raw() -> bytes:
        """Return bytes."""
        return b"\xff\x00"

    def circle() -> list:
        """Return a list that holds itself."""
        held: list = []
        held.append(held)
        return held

    assert (await run_tool(tool_from_function(raw), "{}")).error == "the result is 2 bytes, not text"
    assert (await run_tool(tool_from_function(circle), "{}")).content == '["..."]'


@pytest.mark.parametrize("ending", [SystemExit, KeyboardInterrupt, StopIteration])
async def test_a_tool_that_would_end_the_program_ends_its_call(ending: type[BaseException]):
    def leave() -> str:
        """Leave."""
        raise ending

    async def leave_later() -> str:
        """Leave, asynchronously."""
        raise ending

    assert ending.__name__ in (await run_tool(tool_from_function(leave), "{}")).error
    assert "Error: " in (await run_tool(tool_from_function(leave_later), "{}")).content


@pytest.fixture
def shop_module(tmp_path, monkeypatch) -> str:
    (tmp_path / "corner_shop.py").write_text(
        "from json import dumps\n"
        "def price(article: str) -> int:\n    'Say what it costs.'\n    return 3\n"
        "def order(article: str) -> str:\n    'Order it.'\n    return dumps(article)\n"
        "def _secret() -> None: ...\nclass Till: ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "corner_shop", raising=False)
    return "corner_shop"


def test_a_path_names_a_function_or_all_public_ones_of_a_module(shop_module: str):
    assert [it.__name__ for it in functions_at("corner_shop:price")] == ["price"]
    assert [it.__name__ for it in functions_at("corner_shop")] == ["price", "order"]


def test_a_path_that_leads_nowhere_is_refused_by_name(shop_module: str):
    with pytest.raises(
        ToolRefused, match=r"'no_shop:price' cannot be imported: No module named 'no_shop'; .*PYTHONPATH"
    ):
        functions_at("no_shop:price")
    with pytest.raises(ToolRefused, match="'corner_shop' has no function 'steal'; it has: 'price', 'order'"):
        functions_at("corner_shop:steal")
    with pytest.raises(ToolRefused, match=r"'runtime\.tools' has no public function"):
        functions_at("runtime.tools")
