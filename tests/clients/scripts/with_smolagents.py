import json

from checks import (
    API_KEY,
    BASE_URL,
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
from smolagents import AgentGenerationError, ChatMessage, LogLevel, MessageRole, OpenAIModel, ToolCallingAgent, tool


@tool
def weather(city: CityName) -> str:
    """The weather in a city.

    Args:
        city: The city.
    """
    return look_up(city)


model = OpenAIModel(model_id=MODEL, api_base=BASE_URL, api_key=API_KEY, max_tokens=MAX_TOKENS)


def write(role, text):
    return ChatMessage(role=role, content=[{"type": "text", "text": text}])


def ask(text):
    return [write(MessageRole.USER, text)]


def chat():
    expect(model.generate(ask(QUESTION)).content, "no content")


def stream():
    expect("".join(piece.content or "" for piece in model.generate_stream(ask(QUESTION))), "an empty stream")


def tools():
    # smolagents sends tool_choice="required", and writes calls and results into the history as text.
    said = model.generate(ask(WEATHER_QUESTION), tools_to_call_from=[weather])
    expect(said.tool_calls, f"no call: {said.content!r}")
    arguments = said.tool_calls[0].function.arguments
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    call, result = f"Calling tools:\nweather({arguments!r})", f"Observation:\n{weather(**arguments)}"
    turns = [write(MessageRole.TOOL_CALL, call), write(MessageRole.TOOL_RESPONSE, result)]
    expect(model.generate(ask(WEATHER_QUESTION) + turns).content is not None, "no answer after the tool")


def agent():
    # Every step is a forced call, of `weather` or `final_answer`; after the last one it requests a closing text.
    helper = ToolCallingAgent([weather], model, max_steps=2, verbosity_level=LogLevel.OFF)
    try:
        ended = helper.run(WEATHER_QUESTION, return_full_result=True)
    except AgentGenerationError as error:
        if getattr(error.__cause__, "code", None) == "context_length_exceeded":
            raise ModelLimit("the client's own prompt is longer than the model's context") from error
        raise
    steps = [(step["tool_calls"], step["error"]) for step in ended.steps if step.get("model_output_message")]
    expect(steps and all(calls and error is None for calls, error in steps), repr(steps))


run_checks({"chat": chat, "stream": stream, "tools": tools, "agent": agent})
