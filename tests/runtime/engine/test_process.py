"""The engine process: its arguments, its error messages, and the real one under swaps and faults."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from memory.schema import TrajectoryStage
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.config import AgentConfig, EngineConfig
from runtime.engine.client import Delta
from runtime.engine.model_families import POCKET_MODEL, find_model, holds_unparsed_call
from runtime.engine.process import Engine, find_last_words
from runtime.engine.server_command import server_arguments
from runtime.errors import EngineError, EngineInMaintenance, EngineLost, RequestRefused
from runtime.maintenance import Maintenance
from runtime.serving.hotswap import HotSwap, mean_distance
from tests.runtime.fake_engine import LOOK, FakeEngine
from tests.runtime.levers import Levers
from tests.support.rollouts import play
from tests.support.waiting import wait_until


def test_a_parser_that_is_named_is_taken(base_dir: Path):
    given = server_arguments(EngineConfig(tool_call_parser="pythonic"), base_dir, 7)
    assert given[given.index("--tool-call-parser") + 1] == "pythonic"


def test_what_is_no_model_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        find_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"no model at '\./nothing'"):
        find_model("./nothing")
    with pytest.raises(ValueError, match="or one of smollm2, pocket"):
        find_model("smolm2")
    assert find_model("pocket") == POCKET_MODEL


def test_the_model_is_the_configured_one_else_the_one_of_the_data_directory_else_smollm2(tmp_path: Path) -> None:
    named = Engine(EngineConfig(model="acme/llama"), tmp_path, made_for=str(POCKET_MODEL))
    old = Engine(EngineConfig(), tmp_path, made_for=str(POCKET_MODEL))
    new = Engine(EngineConfig(), tmp_path)
    assert [it.model_name for it in (named, old, new)] == ["acme/llama", str(POCKET_MODEL), "smollm2"]
    assert [it.can_converse for it in (named, old, new)] == [True, False, True]
    assert [it.model_temperature for it in (named, old, new)] == [0.7, 0.7, 0.0]


def test_a_call_that_no_parser_could_read_is_seen():
    assert holds_unparsed_call('I will <tool_call>{"name": oops')
    assert not holds_unparsed_call("I will call you.")


def test_the_engine_listens_on_the_loopback_with_adapters_on(base_dir: Path):
    given = server_arguments(EngineConfig(max_model_len=512, extra_args=["--seed", "7"]), base_dir, 8123)
    text = " ".join(given)
    assert "--host 127.0.0.1 --port 8123" in text
    assert "--enable-lora" in given and "--max-lora-rank 32" in text and "--max-model-len 512" in text
    assert "--seed 7 --host" in text  # the last value wins


def test_json_is_compact_but_for_models_with_mistral_s_own_tokenizer(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    compact = {"backend": "xgrammar", "disable_any_whitespace": True}
    given = server_arguments(EngineConfig(), tmp_path, 7)
    assert json.loads(given[given.index("--structured-outputs-config") + 1]) == compact
    (tmp_path / "tekken.json").write_text("{}")
    assert "--structured-outputs-config" not in server_arguments(EngineConfig(), tmp_path, 7)


def test_last_words_are_the_errors_of_the_log_without_its_noise():
    log = (
        "(APIServer pid=7) INFO 11-22 08:14:38 [api_utils.py:347] fine\n"
        "(EngineCore pid=9) ERROR 11-22 08:14:39 [core.py:12] ValueError: no room for the weights\n"
        "Traceback (most recent call last):\n"
    )
    assert find_last_words(log) == "ValueError: no room for the weights"
    assert find_last_words("one\ntwo\n") == "one | two"
    assert find_last_words("") == "none"


async def test_no_engine_at_the_url_is_one_clear_error(tmp_path: Path):
    engine = Engine(EngineConfig(url="http://127.0.0.1:9"), tmp_path)
    with pytest.raises(EngineError, match=r"no engine answers at 'http://127.0.0.1:9'"):
        await engine.start()
    assert not engine.is_ready


async def test_the_template_of_an_engine_elsewhere_is_read_where_its_directory_is_known(
    fake: FakeEngine, base_dir: Path, tmp_path: Path
):
    shows = tmp_path / "tools.jinja"
    shows.write_text("{{ messages }}{{ tools }}")
    (base_dir / "chat_template.jinja").write_text("{{ messages }}")

    async def takes_tools(**settings: Any) -> bool:
        engine = Engine(EngineConfig(url=fake.url, **settings), tmp_path / "data")
        await engine.start()
        await engine.stop()
        return engine.takes_tools

    assert not await takes_tools()  # the engine says where its model is
    assert not await takes_tools(model=str(base_dir))
    assert await takes_tools(extra_args=["--chat-template", str(shows)])
    assert await takes_tools(model="somebody/elsewhere")


async def test_a_child_whose_end_was_broken_off_is_waited_for_at_the_stop(tmp_path: Path):
    engine = Engine(EngineConfig(), tmp_path)
    child = engine._process = await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True)
    restarting = asyncio.create_task(engine._restart())
    await asyncio.sleep(0)
    restarting.cancel()
    await asyncio.wait({restarting})
    await engine.stop()
    assert child.returncode == -signal.SIGKILL


async def test_a_zombie_is_not_ready_until_a_token_comes_again(engine: Engine, fake: FakeEngine):
    is_reloaded = asyncio.Event()

    async def reload_adapters() -> None:
        assert not engine.is_ready
        is_reloaded.set()

    engine.on_restart = reload_adapters
    watching = asyncio.create_task(engine.watch())
    fake.is_zombie = True
    await wait_until(lambda: not engine.is_ready)
    fake.is_zombie = False
    await engine.wait_until_ready(30)
    assert is_reloaded.is_set()
    watching.cancel()


async def test_a_slow_probe_is_no_proof_of_death_while_tokens_move(engine: Engine, fake: FakeEngine):
    engine.config = engine.config.model_copy(update={"probe_timeout_seconds": 3.0})  # not a hang: the machine is busy
    probes = []

    async def slow_probe(model: str | None = None) -> bool:
        probes.append(model)
        fake.num_tokens += 1  # other requests are served
        await asyncio.sleep(3600)
        return True

    async def tick() -> None:
        while True:
            fake.num_tokens += 1
            await asyncio.sleep(0.05)

    ticking = asyncio.create_task(tick())
    engine.client.probe = slow_probe
    watching = asyncio.create_task(engine.watch())
    async with asyncio.timeout(30):
        while len(probes) < 3 and engine.is_ready:
            await asyncio.sleep(0.05)
    assert engine.is_ready
    for task in (watching, ticking):
        task.cancel()


NUM_SWAPS = 20
NUM_STREAMS = 8
PROBE_IDS = [72, 69, 76, 76, 79, 12, 0, 87, 79, 82]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-shaped model that knows three replies by heart."""
    from tests.runtime import tiny_models

    path = tiny_models.make_model(tmp_path_factory.mktemp("tiny") / "model")
    calls_look = "I look.\n" + tiny_models.tool_call_text("look", {"where": "here"})
    breaks_down = '<tool_call>{"name": "look", "arguments": {bad}}</tool_call>'
    return tiny_models.teach(
        path,
        [
            ([{"role": "user", "content": "go"}], [LOOK], calls_look),
            ([{"role": "user", "content": "bad"}], [LOOK], breaks_down),
            ([{"role": "user", "content": "hi"}], None, "Hello there."),
        ],
    )


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of the tiny model, each with its manifest, as a trainer writes them."""
    from tests.runtime import tiny_models

    home = tmp_path_factory.mktemp("adapters")
    return tiny_models.make_proved_adapters(tiny_model, home, name="tiny", num=NUM_SWAPS)


@pytest.fixture(scope="module")
def phases() -> list[str]:
    return []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, phases: list[str]) -> AsyncIterator[Engine]:
    """The real vLLM, one for all tests of this module."""
    settings = EngineConfig(model=str(tiny_model), kv_cache_gib=1, max_model_len=1024, startup_seconds=900)
    engine = Engine(settings, tmp_path_factory.mktemp("engine"), on_progress=phases.append)
    await engine.start()
    yield engine
    await engine.stop()


def on_real_engine(test):
    """Mark a test that shares the module's engine, and so its event loop."""
    return pytest.mark.engine(pytest.mark.asyncio(loop_scope="module")(test))


async def register(memory: Memory, adapters: list[Path]) -> None:
    await memory.policies.register_base("tiny")
    for path in adapters:
        await memory.policies.draft(adapter_path=str(path), parent=0)


@on_real_engine
async def test_starting_shows_what_it_is_doing_and_ends_with_a_real_token(real: Engine, phases: list[str]):
    assert real.is_ready and await real.client.probe()
    assert "loading the weights" in phases and phases[-1] == "generating a first token"


@on_real_engine
async def test_a_tool_call_comes_back_parsed_with_the_exact_tokens(real: Engine):
    plain = await real.client.chat("base", [{"role": "user", "content": "go"}], [LOOK], temperature=0, max_tokens=120)
    heard = []

    async def on_delta(delta: Delta) -> None:
        heard.append(delta.text)

    streamed = await real.client.chat_stream(
        "base", [{"role": "user", "content": "go"}], [LOOK], on_delta=on_delta, temperature=0, max_tokens=120
    )
    for reply in (plain, streamed):
        assert reply.content == "I look.\n"
        assert reply.tool_calls[0]["function"] == {"name": "look", "arguments": '{"where": "here"}'}
    assert plain.output_token_ids == streamed.output_token_ids
    assert plain.prompt_token_ids == streamed.prompt_token_ids
    assert "".join(heard) == plain.content


@on_real_engine
@pytest.mark.parametrize("tools", [[], [LOOK]], ids=["plain", "tools"])
async def test_each_sampled_token_comes_with_the_log_prob_that_it_was_sampled_with(real: Engine, tools: list):
    asked, sampling = [{"role": "user", "content": "go"}], {"temperature": 1.0, "seed": 3, "logprobs": True}
    heard = []

    async def on_delta(delta: Delta) -> None:
        heard.append(delta)

    plain = await real.client.chat("base", asked, tools, max_tokens=60, **sampling)
    streamed = await real.client.chat_stream("base", asked, tools, on_delta=on_delta, max_tokens=60, **sampling)

    for reply in (plain, streamed):
        scored = await real.client.token_logprobs("base", [*reply.prompt_token_ids, *reply.output_token_ids])
        assert reply.output_logprobs == pytest.approx(scored[-len(reply.output_token_ids) :], abs=0.05)


@on_real_engine
async def test_a_broken_call_is_seen_as_broken_streamed_or_not(real: Engine, memory: Memory):
    await memory.policies.register_base("tiny")
    agent = Agent(memory, HotSwap(memory.policies, real), {}, AgentConfig(max_output_tokens=120, max_steps=1))

    async def ignore(delta: Delta) -> None:
        pass

    for on_delta in (None, ignore):
        trajectory = await play(
            agent, messages=[{"role": "user", "content": "bad"}], tools=[LOOK], temperature=0.0, on_delta=on_delta
        )
        assert trajectory.num_invalid_tool_calls == 1


@on_real_engine
async def test_who_leaves_frees_the_engine_within_half_a_second(real: Engine):
    long = asyncio.create_task(
        real.client.chat("base", [{"role": "user", "content": "hi"}], max_tokens=900, min_tokens=900, temperature=1)
    )
    await asyncio.sleep(0.5)
    long.cancel()
    await asyncio.sleep(0.5)
    before = await real.client.num_tokens_so_far()
    await asyncio.sleep(0.5)
    assert await real.client.num_tokens_so_far() == before


@on_real_engine
async def test_the_base_stays_bare_among_adapters(real: Engine, adapters: list[Path]):
    alone = await real.client.token_logprobs("base", PROBE_IDS)
    worn = adapters[: real.config.max_loras]  # every slot full
    for path in worn:
        await real.client.load_adapter(path.name, str(path))
    names = [path.name for path in worn]
    streams = [
        asyncio.create_task(real.client.chat(name, [{"role": "user", "content": "hi"}], min_tokens=200, max_tokens=200))
        for name in names
    ]
    for _ in range(5):
        among = await real.client.token_logprobs("base", PROBE_IDS)
        assert mean_distance(among, alone) < 0.01
    assert not all(stream.done() for stream in streams)
    await asyncio.gather(*streams)
    for name in names:
        await real.client.unload_adapter(name)


@on_real_engine
async def test_twenty_swaps_under_eight_streams_fail_nobody(real: Engine, memory: Memory, adapters: list[Path]):
    await register(memory, adapters)
    hotswap = HotSwap(memory.policies, real)
    agent = Agent(memory, hotswap, {}, AgentConfig(max_output_tokens=24))
    await hotswap.activate(0)
    done = asyncio.Event()

    async def listen(delta: Delta) -> None:
        pass

    async def stream() -> None:
        while not done.is_set():
            await play(agent, messages=[{"role": "user", "content": "hi"}], on_delta=listen)

    streams = [asyncio.create_task(stream()) for _ in range(NUM_STREAMS)]
    for version in range(1, NUM_SWAPS + 1):
        await hotswap.activate(version)
        await asyncio.sleep(0.2)
    done.set()
    await asyncio.gather(*streams)

    views = memory.trajectories.select(limit=10_000)
    failed = [view.trajectory.error for view in views if view.trajectory.stage is not TrajectoryStage.FINISHED]
    assert failed == []
    assert len({view.trajectory.policy for view in views}) > NUM_SWAPS / 2
    print(f"{len(views)} episodes during {NUM_SWAPS} swaps, 0 failed")


@on_real_engine
async def test_a_schema_is_enforced_and_a_call_is_streamed_in_pieces(real: Engine):
    schema = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
    schema |= {"additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    pieces: list[dict] = []

    async def on_delta(delta: Delta) -> None:
        pieces.extend(delta.calls)

    said = [{"role": "user", "content": "hi"}]
    asked = {"response_format": wanted, "temperature": 0, "max_tokens": 900}
    for reply in (
        await real.client.chat("base", said, **asked),
        await real.client.chat_stream("base", said, on_delta=on_delta, cache_salt="5a" * 32, **asked),
    ):
        assert json.loads(reply.content)["city"] in ("Oslo", "Rome")
    with pytest.raises(RequestRefused):
        await real.client.chat("base", said, **asked | {"response_format": {"type": "json_schema"}})

    go = [{"role": "user", "content": "go"}]
    reply = await real.client.chat_stream("base", go, [LOOK], on_delta=on_delta, temperature=0, max_tokens=120)
    (call,) = reply.tool_calls
    assert len(pieces) > 1 and (pieces[0]["id"], pieces[0]["type"]) == (call["id"], "function")
    names, arguments = ("".join(piece["function"][part] for piece in pieces) for part in ("name", "arguments"))
    assert {"name": names, "arguments": arguments} == call["function"]
    assert json.loads(arguments) == {"where": "here"}


@on_real_engine
async def test_a_forced_call_has_an_object_of_the_schema_for_arguments(real: Engine):
    schema = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
    city = {"type": "function", "function": {"name": "city", "description": "Choose.", "parameters": schema}}
    ping = {"type": "function", "function": {"name": "ping"}}
    named = {"type": "function", "function": {"name": "city"}}

    async def ignore(delta: Delta) -> None:
        pass

    said = [{"role": "user", "content": "hi"}]
    for choice in ("required", named):
        asked = {"tool_choice": choice, "temperature": 1.0, "max_tokens": 400}
        replies = [
            *(real.client.chat("base", said, [city, ping], seed=seed, **asked) for seed in range(6)),
            *(
                real.client.chat_stream("base", said, [city, ping], on_delta=ignore, seed=seed, **asked)
                for seed in range(2)
            ),
        ]
        for reply in await asyncio.gather(*replies):
            assert reply.tool_calls, (choice, reply.content)
            for call in reply.tool_calls:
                wanted = ({},) if call["function"]["name"] == "ping" else ({"city": "Oslo"}, {"city": "Rome"})
                assert json.loads(call["function"]["arguments"]) in wanted


@on_real_engine
async def test_json_holds_no_white_space_to_run_into(real: Engine):
    schema = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}
    schema |= {"additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    asked = {"response_format": wanted, "temperature": 1.0, "max_tokens": 60}
    said = [{"role": "user", "content": "hi"}]
    replies = await asyncio.gather(*(real.client.chat("base", said, seed=seed, **asked) for seed in range(8)))
    assert [(reply.finish_reason, json.loads(reply.content)) for reply in replies] == [("stop", {"city": "Oslo"})] * 8
    assert {"".join(reply.content.split()) for reply in replies} == {'{"city":"Oslo"}'}
    assert all("\n" not in reply.content and len(reply.content) <= len('{"city": "Oslo"}') for reply in replies)


@on_real_engine
async def test_an_engine_killed_in_mid_episode_fails_who_heard_of_it_and_comes_back_with_its_adapters_for_the_others(
    real: Engine, memory: Memory, adapters: list[Path]
):
    await register(memory, adapters[:1])
    hotswap = HotSwap(memory.policies, real)
    agent = Agent(memory, hotswap, {"levers": Levers()}, AgentConfig(max_output_tokens=900, max_seconds=900))
    await hotswap.activate(1)
    watching = asyncio.create_task(real.watch())
    heard = asyncio.Event()

    async def on_delta(delta: Delta) -> None:
        heard.set()

    unheard, listening = (
        asyncio.create_task(
            play(agent, messages=[{"role": "user", "content": "hi"}], sampling={"min_tokens": 900}, on_delta=who)
        )
        for who in (None, on_delta)
    )
    await heard.wait()
    os.kill(real.pid, signal.SIGKILL)

    failed = await listening
    assert failed.stage is TrajectoryStage.FAILED
    assert failed.error.startswith("EngineLost: the engine ")
    retried = await unheard
    assert (retried.stage, retried.policy, retried.num_steps) == (TrajectoryStage.FINISHED, 1, 1)
    assert real.num_restarts == 1 and await real.client.adapters() == {"tiny-v1"}
    watching.cancel()


@on_real_engine
async def test_a_window_stops_the_engine_and_brings_it_back_with_its_adapters(
    real: Engine, memory: Memory, adapters: list[Path]
):
    await register(memory, adapters[:1])
    hotswap = HotSwap(memory.policies, real)
    agent = Agent(memory, hotswap, {}, AgentConfig(max_output_tokens=24))
    await hotswap.activate(1)
    watching, before, began = asyncio.create_task(real.watch()), real.pid, time.monotonic()
    async with Maintenance(real, hotswap, agent.open_episodes, drain_seconds=60.0).window("training"):
        down_after = time.monotonic() - began
        assert real.pid is None and not Path(f"/proc/{before}").exists()
        with pytest.raises(EngineInMaintenance):
            await play(agent, messages=[{"role": "user", "content": "hi"}])
    print(f"down after {down_after:.1f} s, back after {time.monotonic() - began:.1f} s")
    assert real.is_ready and await real.client.adapters() == {"tiny-v1"}
    trajectory = await play(agent, messages=[{"role": "user", "content": "hi"}])
    assert (trajectory.stage, trajectory.policy) == (TrajectoryStage.FINISHED, 1)
    assert real.max_model_len == 1024
    watching.cancel()


def find_core(pid: int) -> int:
    """Return the process in which the engine at `pid` computes."""
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name, parent = (each / "comm").read_text(), (each / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid and "EngineCor" in name:
                return int(each.name)
    raise AssertionError(f"process {pid} has no core")


@on_real_engine
async def test_a_core_that_stands_still_is_found_within_ten_seconds(real: Engine):
    watching = asyncio.create_task(real.watch())
    await asyncio.sleep(1.0)
    call = asyncio.create_task(
        real.client.chat("base", [{"role": "user", "content": "hi"}], min_tokens=900, max_tokens=900)
    )
    await asyncio.sleep(0.5)
    os.kill(find_core(real.pid), signal.SIGSTOP)
    began = time.monotonic()
    while real.is_ready:
        assert await healthy(real.url) or not real.is_ready  # or detected during the request
        await asyncio.sleep(0.05)
    found_after = time.monotonic() - began
    with pytest.raises(EngineLost):
        await call
    watching.cancel()  # the restart is tested above; the new process ends with the module
    await asyncio.wait({watching})
    print(f"found after {found_after:.2f} s")
    assert found_after <= 10.0


async def healthy(url: str) -> bool:
    try:
        async with aiohttp.ClientSession() as http, http.get(f"{url}/health") as answer:
            return answer.status == 200
    except aiohttp.ClientConnectionError:
        return False
