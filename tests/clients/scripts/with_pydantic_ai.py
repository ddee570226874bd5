import asyncio

from checks import (
    API_KEY,
    BASE_URL,
    CITIES,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    WEATHER_QUESTION,
    CityName,
    expect,
    run_checks,
)
from checks import weather as look_up
from pydantic import BaseModel
from pydantic_ai import Agent, ToolOutput
from pydantic_ai.capabilities import PrepareOutputTools, PrepareTools
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    city: CityName


def new_agent(kind=OpenAIChatModel, max_tokens=MAX_TOKENS, **more):
    model = kind(MODEL, provider=OpenAIProvider(base_url=BASE_URL, api_key=API_KEY))
    return Agent(model, model_settings={"max_tokens": max_tokens, "timeout": 300}, retries=0, **more)


def chat():
    expect(asyncio.run(new_agent().run(QUESTION)).output, "no output")


def stream():
    async def run():
        async with new_agent().run_stream(QUESTION) as result:
            return [piece async for piece in result.stream_text(delta=True)]

    expect("".join(asyncio.run(run())), "an empty stream")


def structured():
    # A forced call of the output tool.
    output = asyncio.run(new_agent(max_tokens=200, output_type=ToolOutput(City)).run(QUESTION)).output
    expect(isinstance(output, City), repr(output))


def tools():
    called = []

    def weather(city: CityName) -> str:
        """The weather in a city."""
        called.append(city)
        return look_up(city)

    # One forced tool at a time: first the function and, once it was called, the output.
    async def hide_once_called(_, definitions):
        return [] if called else definitions

    async def hide_until_called(_, definitions):
        return definitions if called else []

    order = [PrepareTools(hide_once_called), PrepareOutputTools(hide_until_called)]
    agent = new_agent(max_tokens=200, output_type=ToolOutput(City), tools=[weather], capabilities=order)
    output = asyncio.run(agent.run(WEATHER_QUESTION)).output
    expect(called and set(called) <= set(CITIES), f"called {called!r}")
    expect(isinstance(output, City), repr(output))


def responses():
    expect(asyncio.run(new_agent(OpenAIResponsesModel).run(QUESTION)).output, "no output")


run_checks({"chat": chat, "stream": stream, "tools": tools, "structured": structured, "responses": responses})
