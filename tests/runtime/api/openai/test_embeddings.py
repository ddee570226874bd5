"""OpenAI's embeddings by the official package and LangChain: vectors, limits, and quotas."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy
import openai
import pytest
from langchain_openai import OpenAIEmbeddings

from memory.schema import Scope
from runtime.api.gateway.admission import ConcurrencyLimit
from runtime.api.openai.embeddings import ENCODE_BATCH
from tests.memory.episodes import DIM, MAX_WORDS, HashingEncoder
from tests.runtime.api.worlds import ServedWorld, error_code
from tests.support.waiting import eventually

TEXTS = ["rain in Oslo", "sunshine in Rome", "rain in Rome"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedWorld]:
    with ServedWorld(tmp_path_factory.mktemp("embeddings") / "data") as world:
        yield world


def embed(client: openai.OpenAI, given: Any = TEXTS, **more: Any) -> Any:
    return client.embeddings.create(**{"model": "hashing", "input": given} | more)


def test_vectors_are_the_encoders_in_the_order_of_the_texts(client: openai.OpenAI) -> None:
    answer = embed(client)
    assert (answer.object, answer.model) == ("list", "hashing")
    assert [each.index for each in answer.data] == [0, 1, 2]
    vectors = numpy.array([each.embedding for each in answer.data])
    assert numpy.allclose(vectors, HashingEncoder().encode(TEXTS))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (9, 9)


def test_both_formats_are_the_same_numbers(client: openai.OpenAI, http: httpx.Client) -> None:
    floats = embed(client, "rain", encoding_format="float").data[0].embedding
    body = {"model": "hashing", "input": "rain", "encoding_format": "base64"}
    packed = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert numpy.frombuffer(base64.b64decode(packed), dtype="<f4").tolist() == floats and len(floats) == DIM
    assert embed(client, "rain", dimensions=DIM, user="jane").data[0].embedding == floats


def test_more_texts_than_a_batch_keep_their_order(client: openai.OpenAI) -> None:
    texts = [f"word{number}" for number in range(2 * ENCODE_BATCH + 1)]
    vectors = numpy.array([each.embedding for each in embed(client, texts).data])
    assert numpy.allclose(vectors, HashingEncoder().encode(texts))


LONG = "word " * (MAX_WORDS + 1)


@pytest.mark.parametrize(
    ("more", "said", "param"),
    [
        ({"input": []}, "input has 0 texts: send 1 to 2048", "input"),
        ({"input": ["x"] * 2049}, "input has 2049 texts", "input"),
        ({"input": ["x", " "]}, r"input\[1\] is empty", "input"),
        ({"input": [1, 2]}, "check_embedding_ctx_length=False", "input"),
        ({"input": [[1, 2]]}, "check_embedding_ctx_length=False", "input"),
        ({"input": [{}]}, "send a text or a list of texts", "input"),
        ({"input": ["x", LONG]}, rf"input\[1\] has {MAX_WORDS + 1} tokens, and the encoder reads {MAX_WORDS}", "input"),
        ({"input": "x" * 10_000}, r"input\[0\] has 10000 characters", "input"),
        ({"dimensions": 64}, f"the vectors have {DIM} dimensions, and cannot be made 64", "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format", "encoding_format"),
        ({"extra_body": {"input_type": "query"}}, "input_type='query' is not supported", "input_type"),
        ({"extra_body": {"truncate_prompt_tokens": 5}}, "truncate_prompt_tokens", "truncate_prompt_tokens"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    client: openai.OpenAI, more: dict[str, Any], said: str, param: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        embed(client, **more)
    assert refused.value.param.split(".")[0] == param


def test_a_long_text_is_shortened_where_the_request_says_so(client: openai.OpenAI) -> None:
    answer = embed(client, [LONG, "rain"], extra_body={"truncate_prompt_tokens": -1})
    assert answer.usage.prompt_tokens == MAX_WORDS + 1 and len(answer.data) == 2


def test_an_unknown_model_is_named_with_the_one_there_is(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'text-embedding-3-small' does not exist; there is: 'hashing'"):
        embed(client, model="text-embedding-3-small")


def test_langchain_embeds_texts_as_they_are(world: ServedWorld) -> None:
    embeddings = OpenAIEmbeddings(
        model="hashing", base_url=f"{world.url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    assert numpy.allclose(embeddings.embed_documents(TEXTS), HashingEncoder().encode(TEXTS))
    assert numpy.allclose(embeddings.embed_query("rain"), HashingEncoder().encode(["rain"])[0])


def test_tokens_count_against_the_keys_quota_and_scopes_hold(tmp_path: Path) -> None:
    with ServedWorld(tmp_path / "data") as world:
        _, key = asyncio.run(world.memory.keys.create("app", [Scope.INFER], tokens_per_minute=5))
        _, other = asyncio.run(world.memory.keys.create("page", [Scope.FEEDBACK]))
        with openai.OpenAI(base_url=f"{world.url}/v1", api_key=key, max_retries=0) as client:
            embed(client)
            with pytest.raises(openai.RateLimitError, match="5 tokens a minute"):
                embed(client)
        with (
            openai.OpenAI(base_url=f"{world.url}/v1", api_key=other, max_retries=0) as client,
            pytest.raises(openai.PermissionDeniedError, match="needs the scope infer"),
        ):
            embed(client)


class SlowEncoder(HashingEncoder):
    """Blocks in each batch until it is released, and records the number of threads inside."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()
        self.batches: list[list[str]] = []
        self.num_inside = self.most_inside = 0

    def encode(self, texts: Sequence[str]) -> numpy.ndarray:
        if texts[0].startswith("slow"):
            self.batches.append(list(texts))
            self.num_inside += 1
            self.most_inside = max(self.most_inside, self.num_inside)
            self.release.wait(20)
            self.num_inside -= 1
        if "unspeakable" in texts:
            raise KeyError("planted")
        return super().encode(texts)


@pytest.fixture
def slow(world: ServedWorld) -> Iterator[SlowEncoder]:
    encoder, usual = SlowEncoder(), world.memory.encoder
    world.memory.encoder = encoder
    yield encoder
    encoder.release.set()
    world.memory.encoder = usual


async def test_requests_take_turns_and_the_event_loop_goes_on(world: ServedWorld, slow: SlowEncoder) -> None:
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client:
        texts = {name: [f"slow {name} {n}" for n in range(2 * ENCODE_BATCH + 1)] for name in ("one", "two")}
        asked = {
            name: asyncio.ensure_future(client.embeddings.create(model="hashing", input=texts[name])) for name in texts
        }
        while not slow.batches or world.services.embeddings._num_occupied.total() < len(asked):
            await asyncio.sleep(0.01)
        answered = await client.get("/models", cast_to=object)  # while the encoder is busy
        assert answered and not any(each.done() for each in asked.values())
        slow.release.set()
        await asyncio.gather(*asked.values())
    names = [batch[0].split()[1] for batch in slow.batches]
    # the second request's tokens may still have to be counted, which takes a turn as well
    assert set(names[:3]) == {"one", "two"}, "the second request had to wait for all of the first"
    assert slow.most_inside == 1


async def test_a_client_that_leaves_is_not_encoded_to_the_end_and_charged_all_the_same(tmp_path: Path) -> None:
    with ServedWorld(tmp_path / "data") as world:
        slow = world.memory.encoder = SlowEncoder()
        _, key = await world.memory.keys.create("app", [Scope.INFER], tokens_per_minute=5)
        await _leave(world, slow, {"Authorization": f"Bearer {key}"})
        with (
            openai.OpenAI(base_url=f"{world.url}/v1", api_key=key, max_retries=0) as client,
            pytest.raises(openai.RateLimitError, match="5 tokens a minute"),
        ):
            embed(client)


async def _leave(world: ServedWorld, slow: SlowEncoder, headers: dict[str, str]) -> None:
    body = {"model": "hashing", "input": [f"slow {number}" for number in range(5 * ENCODE_BATCH)]}
    async with httpx.AsyncClient(base_url=world.url, headers=headers, trust_env=False, timeout=60) as leaving:
        asking = asyncio.ensure_future(leaving.post("/v1/embeddings", json=body))
        while not slow.batches:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait({asking})
    assert eventually(lambda: not world.services.embeddings._num_occupied)
    slow.release.set()
    assert eventually(lambda: slow.num_inside == 0) and len(slow.batches) == 1


async def test_more_requests_than_the_encoder_takes_are_told_to_come_again(
    world: ServedWorld, slow: SlowEncoder, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.services, "embeddings", ConcurrencyLimit(1, holder="the encoder"))
    async with httpx.AsyncClient(base_url=world.url, trust_env=False, timeout=60) as client:
        held = asyncio.ensure_future(client.post("/v1/embeddings", json={"model": "hashing", "input": "slow"}))
        while not slow.batches:
            await asyncio.sleep(0.01)
        refused = await client.post("/v1/embeddings", json={"model": "hashing", "input": "x"})
        slow.release.set()
        assert (await held).status_code == 200
    assert (refused.status_code, error_code(refused)) == (503, "encoder_overloaded")
    assert "the encoder is at work on 1 requests" in refused.json()["error"]["message"]


def test_an_encoder_that_fails_is_said(world: ServedWorld, slow: SlowEncoder, http: httpx.Client) -> None:
    answer = http.post("/v1/embeddings", json={"model": "hashing", "input": "unspeakable"})
    assert (answer.status_code, error_code(answer)) == (503, "encoder_unavailable")
    assert "retry-after" in answer.headers
