import asyncio
import json

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import (
    AssistantMessage,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    UserMessage,
)
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from checks import (
    API_KEY,
    BASE_URL,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    WEATHER_QUESTION,
    CityName,
    expect,
    run_checks,
    weather,
)
from pydantic import BaseModel

ABLE = {"vision": False, "function_calling": True, "json_output": True, "family": "unknown", "structured_output": True}


class City(BaseModel):
    city: CityName


def new_client(max_tokens=MAX_TOKENS):
    settings = {"base_url": BASE_URL, "api_key": API_KEY, "max_retries": 0, "timeout": 300}
    return OpenAIChatCompletionClient(model=MODEL, model_info=ABLE, max_tokens=max_tokens, **settings)


def ask(text):
    return [UserMessage(content=text, source="user")]


def chat():
    expect(asyncio.run(new_client().create(ask(QUESTION))).content, "no content")


def stream():
    async def run():
        return [piece async for piece in new_client().create_stream(ask(QUESTION))]

    pieces = asyncio.run(run())
    expect(pieces and pieces[-1].content, "an empty stream")


def tools():
    tool = FunctionTool(weather, description="The weather in a city.")
    asked = ask(WEATHER_QUESTION)

    async def run():
        client = new_client()
        calls = (await client.create(asked, tools=[tool], tool_choice="required")).content
        expect(isinstance(calls, list), f"no call: {calls!r}")
        results = []
        for call in calls:
            text = weather(**json.loads(call.arguments))
            results.append(FunctionExecutionResult(content=text, name=call.name, call_id=call.id, is_error=False))
        said = AssistantMessage(content=calls, source="helper")
        history = [*asked, said, FunctionExecutionResultMessage(content=results)]
        return await client.create(history, tools=[tool], tool_choice="none")

    expect(isinstance(asyncio.run(run()).content, str), "no answer after the tool")


def structured():
    said = asyncio.run(new_client(200).create(ask(QUESTION), json_output=City))
    expect(City.model_validate_json(said.content), said.content)


def agent():
    async def run():
        return await AssistantAgent("helper", new_client(), tools=[weather]).run(task=WEATHER_QUESTION)

    last = asyncio.run(run()).messages[-1]
    expect(last.source == "helper", repr(last))


run_checks({"chat": chat, "stream": stream, "tools": tools, "structured": structured, "agent": agent})
