from checks import API_KEY, BASE_URL, MAX_TOKENS, MODEL, QUESTION, expect, run_checks
from crewai import LLM, Agent, Crew, Task


def new_llm():
    return LLM(model=f"openai/{MODEL}", base_url=BASE_URL, api_key=API_KEY, max_tokens=MAX_TOKENS, timeout=300)


def chat():
    expect(new_llm().call(QUESTION), "no text")


def agent():
    helper = Agent(role="helper", goal="Answer.", backstory="You answer.", llm=new_llm(), max_iter=1, verbose=False)
    task = Task(description=QUESTION, expected_output="One sentence.", agent=helper)
    expect(Crew(agents=[helper], tasks=[task], verbose=False).kickoff().raw, "no output")


run_checks({"chat": chat, "agent": agent})
