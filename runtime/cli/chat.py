"""The command `chat`: a streamed conversation with the running server, or one question.

In a conversation, a line that begins with `/` is a command. Invariant: only answered messages stay in the conversation,
so that the question can be repeated after an answer broke off.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import sys
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.cli.options import DEFAULT_URL, Json, Key, Url, connect, is_on
from runtime.cli.output import BAD_USAGE, Failure, run_command
from runtime.cli.printable import printable

if TYPE_CHECKING:
    from runtime.cli.client import Client

HELP = """/good, /bad [COMMENT]   rate the last answer: it becomes a reward
/correct TEXT           give a better version of the last answer
/new                    start another conversation
/quit                   leave (or Ctrl-D)"""


@dataclass
class Conversation:
    """The answered messages so far, and the parameters of requests."""

    model: str
    user: str
    use_memory: bool
    messages: list[dict[str, str]] = field(default_factory=list)
    last_answer_id: str | None = None

    def request_body(self, text: str) -> dict[str, Any]:
        """Return the body of a chat completion that continues the conversation."""
        return {
            "model": self.model,
            "messages": [*self.messages, {"role": "user", "content": text}],
            **({"user": self.user} if self.user else {}),
            "metadata": {"use_memory": "on" if self.use_memory else "off"},
        }

    def append(self, text: str, answer: str, answer_id: str) -> None:
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self.last_answer_id = answer_id


def chat(
    text: Annotated[
        str | None, typer.Argument(help="One question; without it, a conversation, or standard input.")
    ] = None,
    user: Annotated[
        str | None, typer.Option(help="Your id, which selects your memories; by default your login name.")
    ] = None,
    memory: Annotated[str, typer.Option(help="on or off.")] = "on",
    policy: Annotated[
        str | None, typer.Option(help="The policy that answers, e.g. v3; by default the active one.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Talk to the agent: a conversation, or one question given as TEXT or on standard input."""
    conversation = Conversation(
        model="agent" if policy is None else f"agent@v{policy.removeprefix('v')}",
        user=user or _login_name(),
        use_memory=is_on("--memory", memory),
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
    with contextlib.suppress(KeyError, OSError):  # in a container the user id may have no name
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
            answer = await client.post("/v1/chat/completions", conversation.request_body(text))
            content = answer["choices"][0]["message"]["content"]
            return {"id": answer["id"], "answer": content, "usage": answer["usage"], **answer["ratchet"]}

    run_command(work, as_json=as_json, render=lambda _: "")  # `_stream` has printed the answer


def _converse(conversation: Conversation, url: str, key: str | None) -> None:
    """Read lines until the end of input."""
    # The loop is synchronous, so that Ctrl-C ends either an answer or the wait for a line: input read in a thread could
    # not be interrupted.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines with it)
    system = list(conversation.messages)  # a copy: /new starts again from the system message
    print("Type a message; /help lists the commands, Ctrl-D quits.")
    with asyncio.Runner() as runner:
        # One loop for the whole conversation: the client's connections belong to it.
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
                    _run_interruptible(runner, _give_feedback(client, conversation, command, rest))
                elif command.startswith("/"):
                    print(f"there is no command {printable(command)!r}\n{HELP}")
                elif line.strip():
                    _run_interruptible(runner, _stream(client, conversation, line))
        finally:
            runner.run(client.close())


def _read_line() -> str | None:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _run_interruptible(runner: asyncio.Runner, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; print its error, or an interruption, and continue the conversation."""
    from runtime.cli.client import ErrorReply, ServerUnreachable

    try:
        runner.run(work)
    except KeyboardInterrupt:
        print("\n(interrupted)")
    except (ErrorReply, ServerUnreachable) as error:
        print(f"\nerror: {printable(str(error))}", file=sys.stderr)


async def _stream(client: Client, conversation: Conversation, text: str) -> None:
    """Print an answer while it arrives, then append it to the conversation."""
    answer, answer_id = "", ""
    async for chunk in client.stream("/v1/chat/completions", {**conversation.request_body(text), "stream": True}):
        answer_id = chunk.get("id") or answer_id
        for choice in chunk.get("choices", []):
            piece = choice["delta"].get("content") or ""
            answer += piece
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
    print()
    conversation.append(text, answer, answer_id)


async def _give_feedback(client: Client, conversation: Conversation, command: str, rest: str) -> None:
    """Post feedback on the last answer."""
    if conversation.last_answer_id is None:
        print("there is no answer yet")
        return
    feedback: dict[str, Any] = {"target": conversation.last_answer_id}
    if command == "/correct":
        if not rest.strip():
            print("/correct needs the better answer: /correct TEXT")
            return
        feedback |= {"value": False, "correction": rest}
    else:
        feedback |= {"value": command == "/good", "comment": rest or None}
    await client.post("/v1/feedback", feedback)
    print("noted")
