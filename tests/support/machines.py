"""Machines of tasks for tests; they need bubblewrap."""

from __future__ import annotations

import pytest

from runtime.environments.machines.machine import require_machines
from runtime.errors import ToolRefused


def find_reason() -> str:
    """Return the reason why no machine can be started here; empty if one can."""
    try:
        require_machines()
    except ToolRefused as refused:
        return str(refused)
    return ""


needs_machine = pytest.mark.skipif(find_reason() != "", reason=find_reason() or "machines can be made here")
