import json

import litellm
from checks import (
    API_KEY,
    BASE_URL,
    CITIES,
    CITY_SCHEMA,
    EMBEDDING_MODEL,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    TEXTS,
    WEATHER,
    WEATHER_QUESTION,
    expect,
    expect_meaning,
    run_checks,
    weather,
)

ASKED = {"model": f"openai/{MODEL}", "api_base": BASE_URL, "api_key": API_KEY, "max_tokens": MAX_TOKENS, "timeout": 300}


def ask(text, **more):
    return litellm.completion(messages=[{"role": "user", "content": text}], **ASKED | more)


def chat():
    expect(ask(QUESTION).choices[0].message.content, "no content")


def stream():
    expect("".join(piece.choices[0].delta.content or "" for piece in ask(QUESTION, stream=True)), "an empty stream")


def tools():
    said = ask(WEATHER_QUESTION, tools=[WEATHER], tool_choice="required").choices[0].message
    expect(said.tool_calls, f"no call: {said.content!r}")
    call = said.tool_calls[0]
    expect(json.loads(call.function.arguments)["city"] in CITIES, call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": weather("Oslo")}
    messages = [{"role": "user", "content": WEATHER_QUESTION}, said, result]
    answer = litellm.completion(messages=messages, tools=[WEATHER], tool_choice="none", **ASKED)
    expect(answer.choices[0].message.content is not None, "no answer after the tool")


def structured():
    schema = {**CITY_SCHEMA, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    said = ask(QUESTION, response_format=form, max_tokens=200).choices[0].message.content
    expect(json.loads(said)["city"] in CITIES, said)


def responses():
    said = litellm.responses(
        model=f"openai/{MODEL}", input=QUESTION, max_output_tokens=MAX_TOKENS, api_base=BASE_URL, api_key=API_KEY
    )
    expect(said.output, f"no output: {said}")


def embeddings():
    given = litellm.embedding(
        model=f"openai/{EMBEDDING_MODEL}", input=list(TEXTS), api_base=BASE_URL, api_key=API_KEY, timeout=300
    )
    expect_meaning([each["embedding"] for each in given.data])


run_checks(
    {
        "chat": chat,
        "stream": stream,
        "tools": tools,
        "structured": structured,
        "responses": responses,
        "embeddings": embeddings,
    }
)
