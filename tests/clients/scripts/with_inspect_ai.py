import asyncio

from checks import API_KEY, BASE_URL, MAX_TOKENS, MODEL, QUESTION, WEATHER_QUESTION, CityName, expect, run_checks
from checks import weather as look_up
from inspect_ai.model import ChatMessageTool, ChatMessageUser, GenerateConfig, ResponseSchema, get_model
from inspect_ai.tool import tool
from inspect_ai.util import json_schema
from pydantic import BaseModel


class City(BaseModel):
    city: CityName


@tool
def weather():
    async def execute(city: CityName) -> str:
        """The weather in a city.

        Args:
            city: The city.
        """
        return look_up(city)

    return execute


def new_model(max_tokens=MAX_TOKENS, **more):
    config = GenerateConfig(max_tokens=max_tokens, max_retries=0, **more)
    return get_model(f"openai/{MODEL}", base_url=BASE_URL, api_key=API_KEY, config=config, memoize=False)


def chat():
    expect(asyncio.run(new_model().generate(QUESTION)).completion, "no completion")


def tools():
    async def run():
        model, asked = new_model(), ChatMessageUser(content=WEATHER_QUESTION)
        said = (await model.generate([asked], tools=[weather()], tool_choice="any")).message
        expect(said.tool_calls, f"no call: {said}")
        results = [ChatMessageTool(content=look_up("Oslo"), tool_call_id=call.id) for call in said.tool_calls]
        return await model.generate([asked, said, *results], tools=[weather()], tool_choice="none")

    expect(isinstance(asyncio.run(run()).completion, str), "no answer after the tool")


def structured():
    schema = ResponseSchema(name="city", json_schema=json_schema(City))
    said = asyncio.run(new_model(200, response_schema=schema).generate(QUESTION))
    expect(City.model_validate_json(said.completion), said.completion)


run_checks({"chat": chat, "tools": tools, "structured": structured})
