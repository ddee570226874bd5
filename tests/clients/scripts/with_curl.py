import json
import subprocess

from checks import (
    BASE_URL,
    CITIES,
    CITY_SCHEMA,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    WEATHER,
    WEATHER_QUESTION,
    expect,
    run_checks,
)

ASKED = {"model": MODEL, "max_tokens": MAX_TOKENS, "messages": [{"role": "user", "content": QUESTION}]}


def post(path, body):
    command = ["curl", "-sS", "--fail-with-body", "-m", "300", "--noproxy", "*", f"{BASE_URL}{path}"]
    command += ["-H", "content-type: application/json", "-d", json.dumps(body)]
    done = subprocess.run(command, capture_output=True, text=True)
    expect(done.returncode == 0, done.stdout + done.stderr)
    return done.stdout


def chat():
    expect(json.loads(post("/chat/completions", ASKED))["choices"][0]["message"]["content"], "no content")


def stream():
    lines = post("/chat/completions", {**ASKED, "stream": True}).split("\n\n")
    expect(len(lines) > 2 and lines[-2] == "data: [DONE]", f"the stream ended with {lines[-2:]!r}")


def tools():
    body = {**ASKED, "messages": [{"role": "user", "content": WEATHER_QUESTION}], "tools": [WEATHER]}
    said = json.loads(post("/chat/completions", {**body, "tool_choice": "required"}))["choices"][0]["message"]
    expect(json.loads(said["tool_calls"][0]["function"]["arguments"])["city"] in CITIES, said)
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "rain"}
    body["messages"] += [said, result]
    post("/chat/completions", {**body, "tool_choice": "none"})


def structured():
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA, "strict": True}}
    said = json.loads(post("/chat/completions", {**ASKED, "max_tokens": 200, "response_format": form}))
    expect(json.loads(said["choices"][0]["message"]["content"])["city"] in CITIES, said)


def responses():
    said = json.loads(post("/responses", {"model": MODEL, "input": QUESTION, "max_output_tokens": MAX_TOKENS}))
    expect(said["output"], said)


run_checks({"chat": chat, "stream": stream, "tools": tools, "structured": structured, "responses": responses})
