"""A client's stream holds only its own calls, numbered as if there were no others."""

from __future__ import annotations

from runtime.agent.client_stream import ClientStream
from runtime.engine.client import Delta


def piece(index: int, name: str = "", arguments: str = "", **more: str) -> dict:
    return {"index": index, "function": {"name": name, "arguments": arguments}, **more}


async def hear(*deltas: Delta) -> list[Delta]:
    heard: list[Delta] = []

    async def on_delta(delta: Delta) -> None:
        heard.append(delta)

    ear = ClientStream(on_delta, {"weather"})
    for delta in deltas:
        await ear(delta)
    return heard


async def test_the_server_s_calls_are_not_heard_and_leave_no_gap():
    heard = await hear(
        Delta(calls=[piece(0, "clock", "{}", id="a")]),
        Delta(calls=[piece(1, "weather", id="b")]),
        Delta(text="so", calls=[piece(0, arguments="x"), piece(1, arguments="{}")]),
    )
    assert [call["index"] for delta in heard for call in delta.calls] == [0, 0]
    assert heard[0].calls[0]["id"] == "b" and heard[1].text == "so"


async def test_a_name_in_two_pieces_is_heard_as_one():
    heard = await hear(Delta(calls=[piece(0, "wea", id="a")]), Delta(calls=[piece(0, "ther", "{")]))
    assert [delta.calls for delta in heard] == [[piece(0, "weather", "{", id="a")]]
