"""The fake engine in place of vLLM's process: the same command line, the same log line, the same key.

`kill -USR1` makes it hang: all routes answer, but no token is generated.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from runtime.engine.server_command import KEY_VARIABLE
from tests.runtime.fake_engine import FakeEngine, Reply, call


async def main(arguments: list[str]) -> None:
    given = dict(zip(arguments[::2], arguments[1::2], strict=False))
    port, base_dir = int(arguments[arguments.index("--port") + 1]), Path(given["--model"])
    fake = FakeEngine(lambda request: Reply("hello"), base_dir=base_dir)
    fake.port, fake.api_key = port, os.environ[KEY_VARIABLE]

    async def say(request: dict) -> Reply:
        if fake.is_zombie or request["messages"][-1]["content"] == "hang":
            await asyncio.sleep(3600)
        if request["messages"][-1]["content"] == "call":
            return call("look", where="here")
        return Reply("hello")

    fake.script = say
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, setattr, fake, "is_zombie", True)
    async with fake:
        print("Application startup complete", flush=True)
        await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[2:]))
