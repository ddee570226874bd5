import json

from checks import (
    API_KEY,
    BASE_URL,
    CITIES,
    CITY_SCHEMA,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    WEATHER_QUESTION,
    CityName,
    ModelLimit,
    expect,
    run_checks,
)
from checks import weather as look_up
from llm.default_plugins.openai_models import Chat


def new_model(**more):
    model = Chat("ours", model_name=MODEL, api_base=BASE_URL, **more)
    model.key = API_KEY
    return model


def chat():
    expect(new_model().prompt(QUESTION, stream=False, max_tokens=MAX_TOKENS).text(), "no text")


def stream():
    expect("".join(new_model().prompt(QUESTION, stream=True, max_tokens=MAX_TOKENS)), "an empty stream")


def structured():
    model = new_model(supports_schema=True)
    text = model.prompt(QUESTION, schema=CITY_SCHEMA, stream=False, max_tokens=200).text()
    expect(json.loads(text)["city"] in CITIES, text)


def tools():
    called = []

    def weather(city: CityName) -> str:
        """The weather in a city."""
        called.append(city)
        return look_up(city)

    model = new_model(supports_tools=True)
    text = model.chain(WEATHER_QUESTION, tools=[weather], stream=False, options={"max_tokens": MAX_TOKENS}).text()
    if not called:
        raise ModelLimit(f"the client cannot force a call, and the model made none: {text!r}")


run_checks({"chat": chat, "stream": stream, "tools": tools, "structured": structured})
