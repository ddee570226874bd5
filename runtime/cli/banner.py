"""What a server says once it answers: where, as whom, who may ask, and what to try with the model that serves."""

from __future__ import annotations

from typing import Any

SHARED = {
    "user": "Memory of a live request is shown to its own user alone; practice, to the whole tenant (docs/keys.md).",
    "tenant": "Memory is shown to the whole tenant, live requests included (memory.share_live).",
}
POCKET_VERBS = ("play --tasks 32", "learn", "trajectories list")
"""The embedded model plays games and does not talk."""
OTHER_VERBS = ("chat", "documents add README.md", "trajectories list")


def render_banner(facts: dict[str, Any], *, command: str, option: str, is_pocket: bool) -> str:
    """Return the text. `command` is how a verb is called, `option` what it needs to find this server."""
    if facts["requires_key"]:
        who = "Everybody needs a key: give it to the commands below as RATCHET_KEY."
    else:
        who = "There are no keys: it listens on the loopback only."
    model = "the embedded pocket model" if is_pocket else facts["base_model"]
    tries = "\n".join(f"  {command} {verb}{option}" for verb in (POCKET_VERBS if is_pocket else OTHER_VERBS))
    return f"""
Ratchet answers at {facts["url"]} with {model} as policy {facts["policy"]}; its API is described at {facts["url"]}/docs
{who}
{SHARED[facts["share_live"]]}
Three things to try, in another terminal:

{tries}

Ctrl-C stops it."""
