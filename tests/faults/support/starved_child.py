"""The fake engine in two processes, as vLLM is: a server that answers at once, and a core that computes each token.

`starved_child.py <pid of the parent> <arguments of vLLM>` is the server and starts its core, `starved_child.py core`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from aiohttp import web

from runtime.engine.server_command import KEY_VARIABLE
from tests.runtime.fake_engine import FakeEngine, say

TOKEN_CPU_SECONDS = 0.02


class TwoProcessEngine(FakeEngine):
    """Has the core compute each token, one after the other."""

    async def _complete(self, request: web.Request) -> web.Response:
        async with self.turn:
            self.core.stdin.write(b"\n")
            await self.core.stdin.drain()
            await self.core.stdout.readline()
        return await super()._complete(request)


async def serve(arguments: list[str]) -> None:
    given = dict(zip(arguments[::2], arguments[1::2], strict=False))
    fake = TwoProcessEngine(say("hello"), base_dir=Path(given["--model"]))
    fake.port, fake.api_key = int(arguments[arguments.index("--port") + 1]), os.environ[KEY_VARIABLE]
    fake.turn = asyncio.Lock()
    pipe = asyncio.subprocess.PIPE
    fake.core = await asyncio.create_subprocess_exec(sys.executable, __file__, "core", stdin=pipe, stdout=pipe)
    async with fake:
        print("Application startup complete", flush=True)
        await asyncio.sleep(3600)


def compute_tokens() -> None:
    for _ in sys.stdin:
        until = time.process_time() + TOKEN_CPU_SECONDS
        while time.process_time() < until:
            pass
        print("token", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "core":
        compute_tokens()
    else:
        asyncio.run(serve(sys.argv[2:]))
