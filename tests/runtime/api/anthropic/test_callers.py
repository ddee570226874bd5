"""The callers of messages: keys, quotas, the memory of one person, and clients that disconnect."""

from __future__ import annotations

import asyncio
from pathlib import Path

import anthropic
import httpx
import pytest

from memory.schema import Scope, TrajectoryStage
from runtime.config import EngineConfig
from runtime.maintenance import Maintenance
from tests.runtime.api.worlds import ServedWorld
from tests.support.waiting import eventually

HI = [{"role": "user", "content": "hi"}]
BODY = {"model": "agent", "max_tokens": 64, "messages": HI}


def ask(client: anthropic.Anthropic, text: str, **metadata: str) -> anthropic.types.Message:
    message = {"role": "user", "content": text}
    return client.messages.create(model="agent", max_tokens=64, messages=[message], metadata=metadata)


def test_a_key_is_read_from_either_header(world: ServedWorld) -> None:
    row, key = asyncio.run(world.memory.keys.create("shop", [Scope.INFER], tenant="shop"))
    for given in ({"api_key": key}, {"auth_token": key}):
        with anthropic.Anthropic(base_url=world.url, max_retries=0, **given) as client:
            ask(client, "hi")
        assert world.memory.trajectories.select(tenant="shop", limit=1)[0].trajectory.key_id == row.id
    with (
        anthropic.Anthropic(base_url=world.url, max_retries=0, api_key="wrong") as client,
        pytest.raises(anthropic.AuthenticationError, match="x-api-key") as refused,
    ):
        ask(client, "hi")
    assert refused.value.type == "authentication_error" and refused.value.error_code == "invalid_api_key"


def test_a_wrong_bearer_is_not_overruled_by_the_other_header(world: ServedWorld, http: httpx.Client) -> None:
    _, key = asyncio.run(world.memory.keys.create("shop", [Scope.INFER]))
    headers = {"Authorization": "Bearer wrong", "x-api-key": key}
    assert http.post("/v1/messages", json=BODY, headers=headers).status_code == 401


def test_scope_and_quota_hold_as_for_every_turn(world: ServedWorld) -> None:
    _, reader = asyncio.run(world.memory.keys.create("page", [Scope.FEEDBACK]))
    _, key = asyncio.run(world.memory.keys.create("app", [Scope.INFER], requests_per_minute=1, tokens_per_minute=10))
    with (
        anthropic.Anthropic(base_url=world.url, max_retries=0, api_key=reader) as client,
        pytest.raises(anthropic.PermissionDeniedError, match="needs the scope infer"),
    ):
        ask(client, "hi")
    with anthropic.Anthropic(base_url=world.url, max_retries=0, api_key=key) as client:
        ask(client, "hi")
        with pytest.raises(anthropic.RateLimitError, match="10 tokens a minute") as refused:
            ask(client, "hi")
    assert refused.value.type == "rate_limit_error" and int(refused.value.response.headers["retry-after"]) > 0


def test_memory_is_shown_to_the_person_of_the_metadata_alone(world: ServedWorld, http: httpx.Client) -> None:
    secret = "My name is Jane Doe, my IBAN is DE89370400440532013000: confirm my refund."
    with anthropic.Anthropic(base_url=world.url, api_key="none", max_retries=0) as client:
        liked = ask(client, secret, user_id="jane")
        http.post("/v1/feedback", json={"target": liked.id, "value": True}).raise_for_status()
        asyncio.run(world.memory.index.drain())
        seen = {}
        for name, metadata in (("jane", {"user_id": "jane"}), ("bob", {"user_id": "bob"}), ("nobody", {})):
            ask(client, secret, **metadata)
            (shown,) = [it["content"] for it in world.engine.calls[-1]["messages"] if it["role"] == "user"]
            seen[name] = "IBAN" in shown.removesuffix(secret)
    assert seen == {"jane": True, "bob": False, "nobody": False}
    assert world.memory.trajectories.get(liked.ratchet["trajectory_id"]).user_id == "jane"


def test_a_server_at_capacity_refuses_before_it_reads(tmp_path: Path, http: httpx.Client, world: ServedWorld) -> None:
    services = world.services
    services.maintenance = Maintenance(world.engine, services.hotswap, services.agent.open_episodes, drain_seconds=1.0)
    services.maintenance.reason = "training"
    answer = http.post("/v1/messages", content=b"not JSON", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
    assert answer.json()["error"]["details"]["error_code"] == "engine_in_maintenance"


async def test_more_turns_than_the_engine_holds_are_overloaded(tmp_path: Path) -> None:
    world = ServedWorld(tmp_path / "small")
    world.engine.config = EngineConfig(max_num_seqs=1, max_num_queued=0)
    with world:
        async with httpx.AsyncClient(base_url=world.url, trust_env=False, timeout=60) as http:
            waiting = BODY | {"messages": [{"role": "user", "content": "wait"}]}
            held = asyncio.ensure_future(http.post("/v1/messages", json=waiting))
            while not world.engine.calls:
                await asyncio.sleep(0.01)
            refused = await http.post("/v1/messages", json=BODY)
            held.cancel()
            await asyncio.wait({held})
        assert (refused.status_code, refused.json()["error"]["type"]) == (529, "overloaded_error")
        assert eventually(lambda: world.engine.num_cut_off == 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_episode(world: ServedWorld, stream: bool) -> None:
    body = BODY | {"messages": [{"role": "user", "content": "wait"}], "stream": stream}
    async with httpx.AsyncClient(base_url=world.url, trust_env=False, timeout=60) as leaving:
        asking = asyncio.ensure_future(leaving.post("/v1/messages", json=body))
        while not world.engine.calls:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait({asking})
    assert eventually(lambda: world.engine.num_cut_off == 1)
    assert eventually(lambda: world.memory.trajectories.select()[0].trajectory.stage is TrajectoryStage.CANCELLED)
