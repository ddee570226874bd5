"""One example of every kind, and rows of every format, for round trips."""

from __future__ import annotations

import json
from typing import Any

from memory.formats.content import ExampleContent, ExampleKind

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name."}},
            "required": ["city"],
        },
    },
}


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(city: str, call_id: str) -> dict[str, Any]:
    arguments = json.dumps({"city": city})
    return {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


ASKED = [say("system", "Be brief."), say("user", "Is it raining in Oslo and in Rome?")]
CALLED = [
    say("assistant", "", tool_calls=[call("Oslo", "call_2_0"), call("Rome", "call_2_1")]),
    say("tool", "rain", tool_call_id="call_2_0"),
    say("tool", "sun", tool_call_id="call_2_1"),
    say("assistant", "In Oslo only \N{EM DASH} take an umbrella."),
]
DEMONSTRATION = ExampleContent(ExampleKind.DEMONSTRATION, [*ASKED, *CALLED], tools=[WEATHER])
PREFERENCE = ExampleContent(
    ExampleKind.PREFERENCE, [say("assistant", "Rain.")], prompt=ASKED, rejected=[say("assistant", "No idea.")]
)
LABEL = ExampleContent(ExampleKind.LABEL, [say("assistant", "Sun?")], prompt=ASKED, is_good=False)
PLAIN = ExampleContent(ExampleKind.DEMONSTRATION, [say("assistant", "42")], prompt=[say("user", "What is 6 times 7?")])
CALL_ALONE = ExampleContent(
    ExampleKind.DEMONSTRATION,
    [say("assistant", "", tool_calls=[call("Oslo", "call_1_0")])],
    prompt=[say("user", "How is Oslo?")],
    tools=[WEATHER],
)
REWARDED = ExampleContent(ExampleKind.DEMONSTRATION, [*ASKED, *CALLED], reward=0.0, task="7")

ROUND_TRIPS = [
    ("openai", DEMONSTRATION),
    ("openai", PREFERENCE),
    ("trl", DEMONSTRATION),
    ("trl", PLAIN),
    ("trl", PREFERENCE),
    ("trl", LABEL),
    ("sharegpt", DEMONSTRATION),
    ("sharegpt", PREFERENCE),
    ("sharegpt", LABEL),
    ("instruction-preference", PREFERENCE),
    ("smart", PLAIN),
    ("alpaca", PLAIN),
    ("question-answer", PLAIN),
    ("xlam", CALL_ALONE),
    ("tau-bench", REWARDED),
    ("ratchet", DEMONSTRATION),
    ("ratchet", PREFERENCE),
    ("ratchet", LABEL),
    ("ratchet", REWARDED),
]
