"""The runtime's exceptions, one leaf for each case that a caller can handle.

    Exception
    ├── EpisodeError             something inside one episode; recorded on its trajectory, never raised by rollout
    │   ├── PolicyError          the engine refused a call or died during it
    │   │   ├── RequestRefused   it rejected the request: an invalid schema, tool or parameter
    │   │   ├── EngineBusy       it is at capacity
    │   │   └── EngineLost       it died during the call, or was not there: the same call may succeed when it is back
    │   ├── ToolError            a tool failed; the message is shown to the model
    │   ├── CriticFailed         a critic behind a URL gave no reward, so the episode has none
    │   └── BudgetExceeded       the episode ran out of steps, tokens, seconds or context
    ├── GameNotCompiled          a task of an environment could not be prepared
    ├── EngineError              the engine cannot be started or is not ready
    │   └── EngineInMaintenance  it is stopped for maintenance and comes back by itself
    ├── EpisodeBusy              another request for this episode is being answered
    ├── AdapterError             an adapter was rejected, or isn't what the engine serves under its name
    ├── LinkRefused              a signed link has a wrong signature
    │   └── LinkExpired          its signature is right, but it has expired
    ├── UnknownEnvironment       no environment has that name (a ValueError)
    ├── UnknownTask              an environment has no such task (a ValueError)
    ├── EnvironmentRefused       a configured environment cannot be offered (a ValueError)
    ├── TaskChanged              a task file changed under the running server
    └── ToolRefused              a configured tool cannot be offered (a ValueError)

`runtime/api/errors.py` maps them to HTTP.
"""

from __future__ import annotations


# The names of these classes are data: rows hold them (`describe_error` in memory/errors.py).
class EpisodeError(Exception):
    """An error inside one episode. It ends that episode and nothing else."""


class PolicyError(EpisodeError):
    """The engine rejected a call, or died during it. `status` is its HTTP status; None without an answer.

    Hazard: the engine's own words, which follow the message in `str(error)`, can quote a prompt. Logs and reports take
    `message` alone.
    """

    def __init__(self, message: str, *, status: int | None = None, quoted: str = "") -> None:
        super().__init__(f"{message}: {quoted}" if quoted else message)
        self.message = message
        self.status = status


class RequestRefused(PolicyError):
    """The engine rejected the request: an invalid schema, tool or parameter."""


class EngineBusy(PolicyError):
    """The engine is at capacity."""


class EngineLost(PolicyError):
    """The engine died during the call, or was not there. The same call may succeed when it is back."""


class ToolError(EpisodeError):
    """Raised by a tool that fails, with a message for the model."""


class CriticFailed(EpisodeError):
    """A critic behind a URL gave no reward. The message names it, and neither its address nor its key."""


class BudgetExceeded(EpisodeError):
    """The episode ran out of steps, tokens, seconds or context. It closes FINISHED, not FAILED."""


class GameNotCompiled(Exception):
    """A compiler died or took too long. The message ends with the end of its standard error."""


class EngineError(Exception):
    """The engine cannot be started, or is not ready. The message quotes the end of its log and names the file."""


class EngineInMaintenance(EngineError):
    """The engine is stopped, or about to be, because training needs its hardware; it comes back by itself."""


class EpisodeBusy(Exception):
    """Another request for this episode is being answered. Nothing was recorded; retry after it."""


class AdapterError(Exception):
    """An adapter was rejected, or isn't what the engine serves under its name. The previous policy stays active."""


class LinkRefused(Exception):
    """A signed link that this server did not create, or that was modified."""


class LinkExpired(LinkRefused):
    """A signed link that has expired."""


class UnknownEnvironment(ValueError):
    """No environment has that name."""


class UnknownTask(ValueError):
    """The environment has no task of that name."""


class TaskSealed(ValueError):
    """A task is sealed: only the report of a release plays it."""


class EnvironmentRefused(ValueError):
    """A configured environment cannot be offered. The message names it, or the lines of its task file, and the
    remedy."""


class TaskChanged(Exception):
    """A task file holds another row where a task was, since the server read it."""


class ToolRefused(ValueError):
    """A configured tool cannot be offered. The message names the tool, its source and the remedy."""
