from checks import (
    API_KEY,
    BASE_URL,
    EMBEDDING_MODEL,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    TEXTS,
    WEATHER_QUESTION,
    CityName,
    expect,
    expect_meaning,
    run_checks,
)
from checks import weather as look_up
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    city: CityName


@tool
def weather(city: CityName) -> str:
    """The weather in a city."""
    return look_up(city)


def new_model(max_tokens=MAX_TOKENS, **more):
    settings = {"base_url": BASE_URL, "api_key": API_KEY, "max_retries": 0, "timeout": 300}
    return ChatOpenAI(model=MODEL, max_tokens=max_tokens, **settings, **more)


def chat():
    expect(new_model().invoke(QUESTION).content, "no content")


def stream():
    expect("".join(piece.content for piece in new_model().stream(QUESTION)), "an empty stream")


def tools():
    model, asked = new_model(), HumanMessage(WEATHER_QUESTION)
    said = model.bind_tools([weather], tool_choice="required").invoke([asked])
    expect(said.tool_calls, f"no call: {said}")
    results = [ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"]) for call in said.tool_calls]
    answer = model.bind_tools([weather], tool_choice="none").invoke([asked, said, *results])
    expect(isinstance(answer.content, str), repr(answer))


def forced_tool():
    said = new_model(200).with_structured_output(City, method="function_calling").invoke(QUESTION)
    expect(isinstance(said, City), repr(said))


def structured():
    said = new_model(200).with_structured_output(City, method="json_schema").invoke(QUESTION)
    expect(isinstance(said, City), repr(said))


def agent():
    ended = create_agent(new_model(), [weather]).invoke({"messages": [("user", WEATHER_QUESTION)]})
    expect(ended["messages"][-1].type == "ai", repr(ended["messages"][-1]))


def responses():
    expect(new_model(use_responses_api=True).invoke(QUESTION).text, "no text")


def embeddings():
    settings = {"base_url": BASE_URL, "api_key": API_KEY, "max_retries": 0, "timeout": 300}
    # Without this switch, LangChain sends tokens of OpenAI's tokenizer instead of texts.
    model = OpenAIEmbeddings(model=EMBEDDING_MODEL, check_embedding_ctx_length=False, **settings)
    expect_meaning(model.embed_documents(list(TEXTS)))


run_checks(
    {
        "chat": chat,
        "stream": stream,
        "tools": tools,
        "forced tool": forced_tool,
        "structured": structured,
        "agent": agent,
        "responses": responses,
        "embeddings": embeddings,
    }
)
