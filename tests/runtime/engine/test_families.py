"""All model families use the same code path: loaded, parsed by their own parser, adapted by a LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime.config import EngineConfig
from runtime.engine.process import Engine
from runtime.serving.hotswap import LEAST_CHANGE_NATS, TOLERANCE_NATS, mean_distance
from tests.runtime.fake_engine import LOOK

pytestmark = [pytest.mark.engine, pytest.mark.slow]

WHERE = {"where": "here"}
CALLS = {
    "qwen3": "<tool_call>" + json.dumps({"name": "look", "arguments": WHERE}) + "</tool_call>",
    "llama": json.dumps({"name": "look", "parameters": WHERE}),
    "mistral": "[TOOL_CALLS]" + json.dumps([{"name": "look", "arguments": WHERE}]),
}
"""A call of the tool, as models of the family write it."""
PARSERS = {"qwen3": "hermes", "llama": "llama3_json", "mistral": "mistral"}


@pytest.mark.parametrize("family", CALLS)
async def test_a_family_is_loaded_parsed_and_adapted(family: str, tmp_path: Path):
    from tests.runtime import tiny_models

    messages = [{"role": "user", "content": "go"}]
    base = tiny_models.make_model(tmp_path / "model", family=family)
    tiny_models.teach(base, [(messages, [LOOK], CALLS[family])])
    (told,) = tiny_models.make_adapters(base, [tmp_path / "adapter"])
    named = {"tool_call_parser": PARSERS[family]}  # the tests' template belongs to no family
    settings = EngineConfig(model=str(base), kv_cache_gib=1, max_model_len=512, startup_seconds=900, **named)
    engine = Engine(settings, tmp_path)
    await engine.start()
    try:
        reply = await engine.client.chat(engine.model, messages, [LOOK], temperature=0.0, max_tokens=120)
        await engine.client.load_adapter("worn", str(tmp_path / "adapter"))
        worn = await engine.client.token_logprobs("worn", told["token_ids"])
        bare = await engine.client.token_logprobs(engine.model, told["token_ids"])
    finally:
        await engine.stop()

    (call,) = reply.tool_calls
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("look", WHERE)
    assert reply.prompt_token_ids and reply.output_token_ids
    assert mean_distance(worn, told["adapter_logprobs"]) < TOLERANCE_NATS
    assert mean_distance(worn, bare) > LEAST_CHANGE_NATS
