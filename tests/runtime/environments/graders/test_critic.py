"""The grader `url`, against a critic that listens on the loopback."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from memory.schema import TrajectoryStage
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.config import AgentConfig, CriticConfig, EnvironmentConfig
from runtime.environments.graders.base import Call, GradingResources, Submission
from runtime.environments.graders.critic import MAX_REPLY_BYTES, MAX_TRIES, Critic, Url
from runtime.environments.registry import open_environments
from runtime.errors import CriticFailed, EnvironmentRefused
from runtime.serving.hotswap import HotSwap
from tests.runtime.fake_engine import FakeEngine, say
from tests.support.rollouts import play

Answer = tuple[int, bytes]
OPENING = [{"role": "user", "content": "?"}]
ASKED = Submission("Good day.", [Call("greet", {"to": "me"})], task="hello", messages=OPENING)


class Listener:
    """A critic that returns its answers one after another, and then repeats the last one."""

    def __init__(self, *answers: Answer, delay_seconds: float = 0.0) -> None:
        self.answers = list(answers)
        self.delay_seconds = delay_seconds
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = ""

    @contextmanager
    def listen(self) -> Iterator[Listener]:
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                listener.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                listener.keys.append(self.headers["Authorization"])
                time.sleep(listener.delay_seconds)
                status, body = listener.answers.pop(0) if len(listener.answers) > 1 else listener.answers[0]
                self.send_response(status)
                self.send_header("Location", "http://127.0.0.1:9/")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                return

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.url = f"http://127.0.0.1:{server.server_port}/score"
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


def reward(value: object, **more: object) -> Answer:
    return 200, json.dumps({"reward": value, **more}).encode()


def grader(**fields: Any) -> Url:
    return Url.model_validate({"type": "url", "critic": "tone", **fields})


async def ask(url: str, *, api_key: str | None = None, pauses: list[float] | None = None, **config: Any):
    paused = [] if pauses is None else pauses

    async def sleep(seconds: float) -> None:
        paused.append(seconds)

    critic = Critic("tone", CriticConfig(url=url, **config), api_key=api_key, sleep=sleep)
    return await grader(reference="Hi.").grade(ASKED, GradingResources(critics={"tone": critic}))


async def test_a_critic_is_sent_the_task_and_the_answer_and_gives_reward_and_comment():
    with Listener(reward(0.7, comment="polite")).listen() as listener:
        outcome = await ask(listener.url, api_key="secret")
    assert (outcome.value, outcome.reason) == (0.7, "polite")
    assert listener.keys == ["Bearer secret"]
    assert listener.requests == [
        {
            "task": "hello",
            "messages": OPENING,
            "answer": "Good day.",
            "calls": [{"name": "greet", "arguments": {"to": "me"}}],
            "reference": "Hi.",
        }
    ]


async def test_a_failure_that_may_pass_is_tried_again_with_growing_pauses():
    pauses: list[float] = []
    with Listener((503, b""), (429, b""), reward(1)).listen() as listener:
        assert (await ask(listener.url, pauses=pauses)).value == 1.0
    assert pauses == [1.0, 2.0]


@pytest.mark.parametrize(
    ("answer", "message", "num_tries"),
    [
        ((500, b""), "the critic 'tone' answered 500 Internal Server Error, 3 times", MAX_TRIES),
        ((401, b""), "answered 401 Unauthorized: configure the variable that holds its key", 1),
        ((307, b""), "redirects are not followed, so configure its final URL", 1),
        ((200, b"no"), "replied 'no', not {\"reward\": a number from 0 to 1", 1),
        ((200, b"[1]"), "replied '.1.', not", 1),
        (reward(1.5), "gave the reward 1.5, not a number from 0 to 1", 1),
        (reward(float("nan")), "gave the reward nan", 1),
        (reward(True), "gave the reward True", 1),
        (reward("1"), "gave the reward '1'", 1),
        (reward(1, comment=["x"]), r"gave the comment \['x'\], not a text", 1),
        ((200, b" " * (MAX_REPLY_BYTES + 1)), "replied more than 65536 bytes", 1),
    ],
)
async def test_a_critic_without_a_reward_is_an_error_and_never_a_reward(answer: Answer, message: str, num_tries: int):
    with Listener(answer).listen() as listener:
        with pytest.raises(CriticFailed, match=message) as raised:
            await ask(listener.url, api_key="secret")
        assert listener.url not in str(raised.value) and "secret" not in str(raised.value)
    assert len(listener.requests) == num_tries


async def test_a_critic_that_is_slow_or_away_is_given_up():
    slow = r"did not reply within 0.05 seconds \(timeout_seconds\), 3 times"
    with Listener(reward(1), delay_seconds=0.3).listen() as listener, pytest.raises(CriticFailed, match=slow):
        await ask(listener.url, timeout_seconds=0.05)
    with pytest.raises(CriticFailed, match=r"cannot be reached \(ConnectError\), 3 times"):
        await ask("http://127.0.0.1:9/")


def test_a_task_file_names_a_critic_of_the_configuration_and_no_address(tmp_path: Path):
    with pytest.raises(ValueError, match=r"'tone' is not configured \(there is: none\)"):
        grader().check([], GradingResources(), has_database=False)
    with pytest.raises(ValidationError):
        grader(url="http://10.0.0.1/")
    for url in ("ftp://host/", "http://user:secret@host/", "host"):
        with pytest.raises(ValidationError):
            CriticConfig(url=url)


@pytest.mark.parametrize(("named", "shown"), [("CRITIC_KEY", "'CRITIC_KEY'"), ("sk-123", "a variable")])
def test_a_missing_key_is_named_at_the_start_unless_it_may_be_the_key_itself(
    named: str, shown: str, tmp_path: Path, monkeypatch
):
    monkeypatch.delenv("CRITIC_KEY", raising=False)
    config = EnvironmentConfig(
        tasks=tmp_path / "t.jsonl", critics={"tone": CriticConfig(url="http://host/", api_key=named)}
    )
    with pytest.raises(EnvironmentRefused, match=rf"environments.mine.critics.tone.api_key names {shown}, which is"):
        open_environments({"mine": config}, tmp_path)


async def test_an_episode_whose_critic_fails_is_not_graded(
    memory: Memory, hotswap: HotSwap, fake: FakeEngine, tmp_path: Path
):
    row = {"name": "hello", "messages": [{"role": "user", "content": "Greet me."}], "grader": {"type": "url"}}
    row["grader"]["critic"] = "tone"
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps(row))
    fake.script = say("Hello.")
    with Listener((400, b""), reward(0.5)).listen() as listener:
        critics = {"tone": CriticConfig(url=listener.url)}
        environments = open_environments({"mine": EnvironmentConfig(tasks=tasks, critics=critics)}, tmp_path)
        agent = Agent(memory, hotswap, environments, AgentConfig())
        failed = await play(agent, environments["mine"].task("hello"))
        graded = await play(agent, environments["mine"].task("hello"))
    assert (failed.stage, failed.error) == (
        TrajectoryStage.FAILED,
        "CriticFailed: the critic 'tone' answered 400 Bad Request",
    )
    assert memory.trajectories.rewards(failed.id) == []
    assert memory.trajectories.effective_reward(graded.id) == 0.5
    assert listener.requests[0]["task"] == "hello"
    assert [message["role"] for message in listener.requests[0]["messages"]] == ["user"]
