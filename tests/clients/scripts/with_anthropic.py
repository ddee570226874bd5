from typing import Literal

import anthropic
from checks import (
    API_KEY,
    BASE_URL,
    CITIES,
    CITY_SCHEMA,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    WEATHER_QUESTION,
    ModelLimit,
    expect,
    run_checks,
)
from checks import weather as look_up
from pydantic import BaseModel

client = anthropic.Anthropic(base_url=BASE_URL.removesuffix("/v1"), api_key=API_KEY, max_retries=0, timeout=300)
ASKED = {"model": MODEL, "max_tokens": MAX_TOKENS}
MESSAGES = [{"role": "user", "content": QUESTION}]
WEATHER = {"name": "weather", "description": "The weather in a city.", "input_schema": CITY_SCHEMA}


class City(BaseModel):
    city: Literal["Oslo", "Bergen"]


@anthropic.beta_tool
def weather(city: Literal["Oslo", "Bergen"]) -> str:
    """The weather in a city."""
    return look_up(city)


def chat():
    said = client.messages.create(messages=MESSAGES, **ASKED)
    expect(said.content[0].text, f"no text: {said}")
    expect(said.usage.input_tokens > 0 and said.usage.output_tokens > 0, f"usage {said.usage}")
    expect(client.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens > 0, "no tokens were counted")


def stream():
    with client.messages.stream(messages=MESSAGES, **ASKED) as events:
        text = "".join(events.text_stream)
        said = events.get_final_message()
    expect(text and text == said.content[0].text, f"the pieces {text!r} do not add up to {said.content}")
    expect(said.stop_reason, "no stop_reason")


def tools(choice):
    messages = [{"role": "user", "content": WEATHER_QUESTION}]
    said = client.messages.create(messages=messages, tools=[WEATHER], tool_choice=choice, **ASKED)
    calls = [block for block in said.content if block.type == "tool_use"]
    expect(calls, f"no call was made: {said.content}")
    expect(calls[0].input["city"] in CITIES, f"input {calls[0].input!r}")
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": look_up("Oslo")} for call in calls]
    messages += [{"role": "assistant", "content": said.content}, {"role": "user", "content": results}]
    answer = client.messages.create(messages=messages, tools=[WEATHER], tool_choice={"type": "none"}, **ASKED)
    expect(answer.content[0].type == "text", "no answer after the tool")


def required_tool():
    tools({"type": "any"})


def forced_tool():
    tools({"type": "tool", "name": "weather"})


def structured():
    said = client.messages.parse(messages=MESSAGES, output_format=City, **{**ASKED, "max_tokens": 200})
    expect(said.parsed_output.city in CITIES, f"{said.content}")


def agent():
    messages = [{"role": "user", "content": WEATHER_QUESTION}]
    runner = client.beta.messages.tool_runner(messages=messages, tools=[weather], max_iterations=4, **ASKED)
    replies = list(runner)
    expect(replies, "the loop had no reply")
    if len(replies) == 1:
        raise ModelLimit(f"the model made no call: {replies[0].content}")


run_checks(
    {
        "chat": chat,
        "stream": stream,
        "tools": required_tool,
        "forced tool": forced_tool,
        "structured": structured,
        "agent": agent,
    }
)
