from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from checks import API_KEY, BASE_URL, MAX_TOKENS, MODEL, QUESTION, WEATHER_QUESTION, CityName, expect, run_checks
from checks import weather as look_up
from openai import AsyncOpenAI

set_tracing_disabled(True)


def new_agent(kind, **more):
    # A new client for each check, because each runs in its own event loop.
    client = AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0, timeout=300)
    settings = more.pop("model_settings", ModelSettings(max_tokens=MAX_TOKENS))
    return Agent("helper", model=kind(MODEL, client), model_settings=settings, **more)


def chat():
    expect(Runner.run_sync(new_agent(OpenAIChatCompletionsModel), QUESTION).final_output, "no output")


def responses():
    expect(Runner.run_sync(new_agent(OpenAIResponsesModel), QUESTION).final_output, "no output")


def stream():
    import asyncio

    async def run():
        result = Runner.run_streamed(new_agent(OpenAIChatCompletionsModel), QUESTION)
        kinds = [event.type async for event in result.stream_events()]
        return kinds, result.final_output

    kinds, output = asyncio.run(run())
    expect("raw_response_event" in kinds and output, f"{kinds}")


def tools():
    called = []

    @function_tool
    def weather(city: CityName) -> str:
        """The weather in a city."""
        called.append(city)
        return look_up(city)

    settings = ModelSettings(max_tokens=MAX_TOKENS, tool_choice="required")
    agent = new_agent(OpenAIChatCompletionsModel, tools=[weather], model_settings=settings)
    result = Runner.run_sync(agent, WEATHER_QUESTION, max_turns=4)
    expect(called and result.final_output is not None, f"called {called}")


def structured():
    from pydantic import BaseModel

    class City(BaseModel):
        city: CityName

    settings = ModelSettings(max_tokens=200)
    result = Runner.run_sync(new_agent(OpenAIChatCompletionsModel, output_type=City, model_settings=settings), QUESTION)
    expect(isinstance(result.final_output, City), repr(result.final_output))


run_checks({"chat": chat, "stream": stream, "tools": tools, "structured": structured, "responses": responses})
