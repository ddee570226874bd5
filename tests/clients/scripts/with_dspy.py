import dspy
from checks import API_KEY, BASE_URL, CITIES, MODEL, QUESTION, CityName, expect, run_checks
from dspy.lm15 import AccessPolicy, ModelSupport, OpenAIChatCompat, ProviderDefinition, register_provider

# dspy requests JSON only of models that it knows to support it; a custom server must be declared.
provider = ProviderDefinition.chat(AccessPolicy(provider="ratchet", base_url=BASE_URL), compat=OpenAIChatCompat())
register_provider(provider, supports=ModelSupport(response_schema=True))
lm = dspy.LM(f"ratchet/{MODEL}", api_base=BASE_URL, api_key=API_KEY, max_tokens=200, cache=False, num_retries=0)


class Answer(dspy.Signature):
    """Answer in one word."""

    question: str = dspy.InputField()
    city: CityName = dspy.OutputField()


def chat():
    (text,) = lm(QUESTION)
    expect(text, "no text")


def structured():
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        expect(dspy.Predict(Answer)(question=QUESTION).city in CITIES, "no city")


run_checks({"chat": chat, "structured": structured})
