"""What can go wrong while answering, one leaf for each thing a caller can act on.

    Exception
    ├── EpisodeError             something inside one episode; recorded on its trajectory, never raised by rollout
    │   ├── PolicyError          the engine refused a call or died during it
    │   │   ├── RequestRefused   it refused what was asked of it: a schema or a parameter that cannot be
    │   │   ├── EngineBusy       it has as much to do as it takes
    │   │   └── EngineLost       it died during the call, or was not there: the same call may succeed when it is back
    │   ├── ToolError            a tool's own way of saying no; its message is shown to the model
    │   └── BudgetExceeded       the episode ran out of steps, tokens, seconds or context
    ├── GameNotCompiled          a task of an environment could not be made ready
    ├── EngineError              the engine cannot be started or is not ready
    │   └── EngineInMaintenance  it is stopped on purpose and comes back by itself
    ├── EpisodeBusy              a request for this episode is being answered already
    ├── AdapterError             an adapter was refused, or isn't what the engine serves under its name
    ├── LinkRefused              a signed link that was not made here, or was changed
    │   └── LinkExpired          its time is over
    ├── UnknownEnvironment       no environment has that name (a ValueError)
    ├── UnknownTask              an environment has no such task (a ValueError)
    └── ToolRefused              a configured tool cannot be offered (a ValueError)

Refuses to know who catches them, and what HTTP makes of them.
"""

from __future__ import annotations


class EpisodeError(Exception):
    """Something inside one episode. It ends that episode, and nothing else."""


class PolicyError(EpisodeError):
    """The engine refused a call, or died during it. `status` is its HTTP status; None when there was no answer."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class RequestRefused(PolicyError):
    """The engine refused what was asked of it: a schema, a tool or a parameter that cannot be."""


class EngineBusy(PolicyError):
    """The engine has as much to do as it takes, and said so."""


class EngineLost(PolicyError):
    """The engine died during the call, or was not there. The same call may succeed when it is back."""


class ToolError(EpisodeError):
    """Raised by a tool to say no in words that the model should read."""


class BudgetExceeded(EpisodeError):
    """The episode ran out of steps, tokens, seconds or context. It closes FINISHED: being slow is not a crash."""


class GameNotCompiled(Exception):
    """A compiler died or took too long. The message ends with what it said last."""


class EngineError(Exception):
    """The engine cannot be started, or is not ready. The message ends with what its log said last, and where it is."""


class EngineInMaintenance(EngineError):
    """The engine is stopped, or about to be, because something else needs its hardware; it comes back by itself."""


class EpisodeBusy(Exception):
    """A request for this episode is being answered already. Nothing was recorded; ask again when it is."""


class AdapterError(Exception):
    """An adapter was refused, or isn't what the engine serves under its name. The policy before it stays on."""


class LinkRefused(Exception):
    """A signed link that this server did not make, or that was changed on its way."""


class LinkExpired(LinkRefused):
    """The time of a signed link is over."""


class UnknownEnvironment(ValueError):
    """No environment has that name."""


class UnknownTask(ValueError):
    """The environment has no task of that name."""


class ToolRefused(ValueError):
    """A configured tool cannot be offered. The message names it, where it comes from, and the mend."""
