"""The verb `chat`: a conversation with the running server, streamed, or one question and its answer.

Each answer is a trajectory like any client's; in a conversation, a line that begins with `/` is a command. Only the
messages that were answered stay in the conversation, so that an answer that broke off can be asked for again.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from runtime.cli.output import BAD_USAGE, Failure, perform
from runtime.cli.printable import printable
from runtime.cli.verbs import DEFAULT_URL, Json, Key, Url, connect

HELP = """/good, /bad [COMMENT]   what you think of the last answer: it becomes a reward
/correct TEXT           what the last answer should have been
/new                    begin another conversation
/quit                   leave (or Ctrl-D)"""


@dataclass
class Conversation:
    """What was said so far, and how the server is asked."""

    model: str
    user: str
    use_memory: bool
    messages: list[dict[str, str]] = field(default_factory=list)
    last_answer_id: str | None = None

    def request(self, text: str) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [*self.messages, {"role": "user", "content": text}],
            **({"user": self.user} if self.user else {}),
            "metadata": {"use_memory": "on" if self.use_memory else "off"},
        }

    def note(self, text: str, answer: str, answer_id: str) -> None:
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self.last_answer_id = answer_id


def chat(
    text: Annotated[
        str | None, typer.Argument(help="One question; without it, a conversation, or what is piped in.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="Who asks: memory of you is shown to you. Your login name.")] = None,
    memory: Annotated[str, typer.Option(help="on or off.")] = "on",
    policy: Annotated[str | None, typer.Option(help="Who answers, e.g. v3; the active policy if not given.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Talk to the agent: a conversation, or one question given as TEXT or on standard input."""
    if memory not in ("on", "off"):
        raise Failure(f"--memory is on or off, not {memory!r}", exit_code=BAD_USAGE)
    conversation = Conversation(
        model="agent" if policy is None else f"agent@v{policy.removeprefix('v')}",
        user=user or _login_name(),
        use_memory=memory == "on",
        messages=[{"role": "system", "content": system}] if system else [],
    )
    if text is None and not sys.stdin.isatty():
        text = sys.stdin.read()
    if text is not None:
        _ask_once(conversation, text, url, key, as_json)
    elif as_json:
        raise Failure("--json needs one question: give it as TEXT or on standard input", exit_code=BAD_USAGE)
    else:
        _converse(conversation, url, key)


def _login_name() -> str:
    with contextlib.suppress(KeyError, OSError):  # a container may run as a number without a name
        return getpass.getuser()
    return ""


def _ask_once(conversation: Conversation, text: str, url: str, key: str | None, as_json: bool) -> None:
    if not text.strip():
        raise Failure("there is no question: give it as TEXT or on standard input", exit_code=BAD_USAGE)

    async def work() -> dict[str, Any]:
        async with connect(url, key) as client:
            if not as_json:
                await _stream(client, conversation, text)
                return {}
            answer = await client.post("/v1/chat/completions", conversation.request(text))
            content = answer["choices"][0]["message"]["content"]
            return {"id": answer["id"], "answer": content, "usage": answer["usage"], **answer["ratchet"]}

    perform(work, as_json=as_json, show=lambda _: "")  # the answer is on the screen already


def _converse(conversation: Conversation, url: str, key: str | None) -> None:
    """Read lines until the end of input. The loop is synchronous, so that Ctrl-C ends an answer or the waiting for a
    line, whichever is under way: input read in a thread could not be interrupted."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines with it)
    system = list(conversation.messages)
    print("Say something; /help lists the commands, Ctrl-D ends it.")
    with asyncio.Runner() as runner:
        client = connect(url, key)
        try:
            while (line := _read_line()) is not None:
                command, _, rest = line.strip().partition(" ")
                if command == "/quit":
                    return
                if command == "/new":
                    conversation.messages, conversation.last_answer_id = list(system), None
                elif command == "/help":
                    print(HELP)
                elif command in ("/good", "/bad", "/correct"):
                    _try(runner, lambda command=command, rest=rest: _comment(client, conversation, command, rest))
                elif command.startswith("/"):
                    print(f"there is no command {printable(command)!r}\n{HELP}")
                elif line.strip():
                    _try(runner, lambda line=line: _stream(client, conversation, line))
        finally:
            runner.run(client.close())


def _read_line() -> str | None:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _try(runner: asyncio.Runner, work: Callable[[], Any]) -> None:
    """Do one thing; print what goes wrong, and go on with the conversation."""
    from runtime.cli.client import NoServer, Refused

    try:
        runner.run(work())
    except KeyboardInterrupt:
        print("\n(interrupted)")
    except (Refused, NoServer) as problem:
        print(f"\nerror: {printable(str(problem))}", file=sys.stderr)


async def _stream(client: Any, conversation: Conversation, text: str) -> None:
    """Print an answer as it comes, and take it into the conversation."""
    answer, answer_id = "", ""
    async for chunk in client.stream("/v1/chat/completions", {**conversation.request(text), "stream": True}):
        answer_id = chunk.get("id") or answer_id
        for choice in chunk.get("choices", []):
            piece = choice["delta"].get("content") or ""
            answer += piece
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
    print()
    conversation.note(text, answer, answer_id)


async def _comment(client: Any, conversation: Conversation, command: str, rest: str) -> None:
    """Post what a person thinks of the last answer."""
    if conversation.last_answer_id is None:
        print("there is no answer yet")
        return
    said: dict[str, Any] = {"target": conversation.last_answer_id}
    if command == "/correct":
        if not rest.strip():
            print("/correct wants the better answer behind it")
            return
        said |= {"value": False, "correction": rest}
    else:
        said |= {"value": command == "/good", "comment": rest or None}
    await client.post("/v1/feedback", said)
    print("noted")
