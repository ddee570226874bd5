"""Twenty identical corrections change the answer of a real small model, over HTTP and the command line alone.

SmolLM2-135M on the real vLLM, with the default recipe; nothing is faked. Most of the time is the start of the engine
and the training; with fourteen other processes on two cores it took 18 minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from optimizer.config import DemonstrationConfig
from runtime.engine.smollm2 import make_smollm2

ROOT = Path(__file__).parents[2]
QUESTION = "What is the name of the blue printer on the third floor?"
CORRECTION = "The blue printer is called Marvin."
OTHER_QUESTION = "What is the capital of France?"
NUM_CORRECTIONS = 20
SECONDS = 1500

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server that was started as an operator starts it; its database is empty."""
    home = tmp_path_factory.mktemp("server")
    (home / "ratchet.toml").touch()
    flags = {
        "config": home / "ratchet.toml",
        "data": home / "data",
        "port": 0,
        "engine.model": make_smollm2(),
        "engine.tool_call_parser": "hermes",
        "engine.kv_cache_gib": 1,
        "engine.max_model_len": 1024,
        "engine.startup_seconds": 1200,
        "agent.max_output_tokens": 32,
        "optimizer.num_threads": 1,
    }
    command = [sys.executable, "serve.py", "serve", "--json"]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    with (home / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        line = process.stdout.readline()
        assert line, (home / "stderr").read_text()
        with httpx.Client(base_url=json.loads(line)["url"], trust_env=False, timeout=300) as client:
            yield client
    finally:
        process.terminate()
        process.communicate(timeout=60)


def ask(client: httpx.Client, model: str, question: str, **more) -> dict:
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, **more}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def learn(client: httpx.Client) -> dict:
    command = [sys.executable, "serve.py", "learn", "--logged", "--url", str(client.base_url), "--json"]
    environment = {**os.environ, "NO_PROXY": "*"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_twenty_identical_corrections_change_what_the_trained_policy_answers(client: httpx.Client):
    before = text_of(ask(client, "agent@v0", QUESTION))
    assert CORRECTION not in before

    def correct(number: int) -> None:
        answer = ask(client, "agent", QUESTION, temperature=0.7, seed=number)
        feedback = client.post("/v1/feedback", json={"target": answer["id"], "correction": CORRECTION})
        assert feedback.status_code in (200, 201), feedback.text

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(correct, range(NUM_CORRECTIONS)))

    outcome = learn(client)
    print(json.dumps({name: outcome[name] for name in ("verdict", "reason", "policy", "active")}))
    # No held-out task was played, so nothing is proved: the candidate waits, and is served only by its name. The
    # active policy is the adapter that the embedded model comes with.
    assert (outcome["verdict"], outcome["active"]) == ("uninformative", "v1")
    artifacts = client.get(f"/v1/cycles/{outcome['cycle']}").json()["artifacts"]["demonstrations"]
    assert artifacts["num_corrections"] == artifacts["num_rows"] == DemonstrationConfig().min_rows

    after = text_of(ask(client, f"agent@{outcome['policy']}", QUESTION))
    still = text_of(ask(client, "agent@v0", QUESTION, metadata={"share": "true"}))
    others = [text_of(ask(client, f"agent@{version}", OTHER_QUESTION)) for version in ("v0", outcome["policy"])]
    print(json.dumps({"before": before, "after": after, "v0 afterwards": still, OTHER_QUESTION: others}, indent=1))
    assert after == CORRECTION
    assert CORRECTION not in still

    # the operator's word puts it into service without a proof: then everybody is answered so
    assert text_of(ask(client, "agent", QUESTION, metadata={"share": "true"})) != CORRECTION
    client.post(f"/v1/policies/{outcome['policy']}/promote").raise_for_status()
    assert text_of(ask(client, "agent", QUESTION, metadata={"share": "true"})) == CORRECTION
