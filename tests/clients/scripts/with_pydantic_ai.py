import asyncio

from checks import API_KEY, BASE_URL, MAX_TOKENS, MODEL, QUESTION, WEATHER_QUESTION, expect, run_checks
from checks import weather as look_up
from pydantic import BaseModel
from pydantic_ai import Agent, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    city: str


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
    # A forced call of the tool that takes the output.
    output = asyncio.run(new_agent(max_tokens=200, output_type=ToolOutput(City)).run(QUESTION)).output
    expect(isinstance(output, City), repr(output))


def tools():
    called = []
    agent = new_agent(max_tokens=200, output_type=ToolOutput(City))

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather in a city."""
        called.append(city)
        return look_up(city)

    output = asyncio.run(agent.run(WEATHER_QUESTION)).output
    expect(isinstance(output, City), repr(output))


def responses():
    expect(asyncio.run(new_agent(OpenAIResponsesModel).run(QUESTION)).output, "no output")


run_checks({"chat": chat, "stream": stream, "tools": tools, "structured": structured, "responses": responses})
