"""What a newcomer does in the first minutes of `make serve`: the default model chats, reads a document, uses a tool.

SmolLM2-135M with the adapter that comes with it, on the real vLLM, over the command line and HTTP; nothing is faked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = """\
The workshop in Lund has one printer for labels. It is called Marvin and stands beside the door to the yard.
To unlock the printer Marvin, enter the code 4711 and press the green button twice.
"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city today.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The name of the city."}},
            "required": ["city"],
        },
    },
}

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with nothing but defaults, in a new data directory."""
    home = tmp_path_factory.mktemp("server")
    (home / "ratchet.toml").touch()
    command = [sys.executable, "serve.py", "serve", "--json", "--config", str(home / "ratchet.toml")]
    command += ["--data", str(home / "data"), "--port", "0"]
    with (home / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        line = process.stdout.readline()
        assert line, (home / "stderr").read_text()
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        process.communicate(timeout=60)


def run(url: str, *arguments: str) -> str:
    command = [sys.executable, "serve.py", *arguments, "--url", url]
    environment = {**os.environ, "NO_PROXY": "*"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_knows_the_capital_of_france(url: str):
    assert "Paris" in run(url, "chat", "What is the capital of France?")


def test_it_answers_from_a_document_what_it_did_not_know_before(url: str, tmp_path: Path):
    question = "Which code unlocks the printer Marvin?"
    assert "4711" not in run(url, "chat", question)
    (tmp_path / "workshop.md").write_text(DOCUMENT, encoding="utf-8")

    run(url, "documents", "add", str(tmp_path / "workshop.md"))

    assert "4711" in run(url, "chat", question)


def test_it_calls_a_tool_and_answers_with_the_result(url: str):
    def ask(messages: list[dict]) -> dict:
        body = {"model": "agent", "messages": messages, "tools": [WEATHER]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
        return answer.raise_for_status().json()["choices"][0]

    messages = [{"role": "user", "content": "What is the weather in Oslo today?"}]
    asked = ask(messages)
    assert asked["finish_reason"] == "tool_calls"
    (call,) = asked["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather" and json.loads(call["function"]["arguments"]) == {"city": "Oslo"}

    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"sky": "snow"}'}
    answered = ask([*messages, asked["message"], result])
    assert answered["finish_reason"] == "stop" and "snow" in answered["message"]["content"]
