from checks import API_KEY, BASE_URL, MAX_TOKENS, MODEL, QUESTION, WEATHER_QUESTION, expect, run_checks
from checks import weather as look_up
from smolagents import ChatMessage, MessageRole, OpenAIModel, tool


@tool
def weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: The city.
    """
    return look_up(city)


model = OpenAIModel(model_id=MODEL, api_base=BASE_URL, api_key=API_KEY, max_tokens=MAX_TOKENS)


def ask(text):
    return [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": text}])]


def chat():
    expect(model.generate(ask(QUESTION)).content, "no content")


def stream():
    expect("".join(piece.content or "" for piece in model.generate_stream(ask(QUESTION))), "an empty stream")


def tools():
    # smolagents asks with tool_choice="required"; its agents run the call and go on by themselves.
    said = model.generate(ask(WEATHER_QUESTION), tools_to_call_from=[weather])
    expect(said.tool_calls, f"no call: {said.content!r}")
    arguments = said.tool_calls[0].function.arguments
    arguments = __import__("json").loads(arguments) if isinstance(arguments, str) else arguments
    expect("Oslo" in weather(city="Oslo") and isinstance(arguments["city"], str), repr(arguments))


run_checks({"chat": chat, "stream": stream, "tools": tools})
