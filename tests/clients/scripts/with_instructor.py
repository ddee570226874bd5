import instructor
import openai
from checks import API_KEY, BASE_URL, MODEL, QUESTION, CityName, expect, run_checks
from pydantic import BaseModel


class City(BaseModel):
    city: CityName


def extract(mode):
    plain = openai.OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0, timeout=300)
    client = instructor.from_openai(plain, mode=mode)
    asked = {"model": MODEL, "max_tokens": 200, "max_retries": 0, "response_model": City}
    said = client.chat.completions.create(messages=[{"role": "user", "content": QUESTION}], **asked)
    expect(isinstance(said, City), repr(said))


def forced_tool():
    extract(instructor.Mode.TOOLS)


def structured():
    extract(instructor.Mode.JSON_SCHEMA)


run_checks({"forced tool": forced_tool, "structured": structured})
