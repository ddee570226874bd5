import json

import openai
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

client = openai.OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0, timeout=300)
ASKED = {"model": MODEL, "max_tokens": MAX_TOKENS}
MESSAGES = [{"role": "user", "content": QUESTION}]


def chat():
    said = client.chat.completions.create(messages=MESSAGES, **ASKED)
    expect(said.choices[0].message.content, f"no content: {said}")
    expect(said.usage.total_tokens > 0, "no usage")


def stream():
    pieces = list(client.chat.completions.create(messages=MESSAGES, stream=True, **ASKED))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    expect(text, "an empty stream")
    expect(any(piece.choices and piece.choices[0].finish_reason for piece in pieces), "no finish_reason")


def tools(choice):
    messages = [{"role": "user", "content": WEATHER_QUESTION}]
    said = client.chat.completions.create(messages=messages, tools=[WEATHER], tool_choice=choice, **ASKED)
    calls = said.choices[0].message.tool_calls
    expect(calls, f"no call was made: {said.choices[0].message.content!r}")
    arguments = json.loads(calls[0].function.arguments)
    expect(isinstance(arguments, dict) and arguments["city"] in CITIES, f"arguments {arguments!r}")
    messages += [said.choices[0].message, {"role": "tool", "tool_call_id": calls[0].id, "content": weather("Oslo")}]
    answer = client.chat.completions.create(messages=messages, tools=[WEATHER], tool_choice="none", **ASKED)
    expect(answer.choices[0].message.content is not None, "no answer after the tool")


def forced_tool():
    tools({"type": "function", "function": {"name": "weather"}})


def required_tool():
    tools("required")


def structured():
    schema = {**CITY_SCHEMA, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    asked = {**ASKED, "max_tokens": 200}
    said = client.chat.completions.create(messages=MESSAGES, response_format=form, **asked)
    expect(json.loads(said.choices[0].message.content)["city"] in CITIES, said.choices[0].message.content)


def responses():
    said = client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=MAX_TOKENS)
    expect(said.output_text, f"no text: {said}")
    again = client.responses.create(
        model=MODEL, input="And again.", previous_response_id=said.id, max_output_tokens=MAX_TOKENS
    )
    expect(again.previous_response_id == said.id, "the conversation was lost")


def embeddings():
    given = client.embeddings.create(model=EMBEDDING_MODEL, input=list(TEXTS))
    expect(given.usage.prompt_tokens > 0, f"usage {given.usage}")
    expect_meaning([each.embedding for each in given.data])


run_checks(
    {
        "chat": chat,
        "stream": stream,
        "tools": required_tool,
        "forced tool": forced_tool,
        "structured": structured,
        "responses": responses,
        "embeddings": embeddings,
    }
)
