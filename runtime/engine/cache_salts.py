"""What keeps one tenant from learning, by the time an answer takes, that another asked the same before.

The engine finds the beginnings of prompts again in a cache, and a hit is quick. A salt in the request makes that
tenant's part of the cache its own. Refuses to know the engine.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets


class CacheSalts:
    """One salt a tenant, unknown to all outside, the same for the life of this object: the cache lives no longer."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def for_tenant(self, tenant: str) -> dict[str, str]:
        """Return what a model call of this tenant says beside its sampling. The default tenant's calls say nothing."""
        if not tenant:
            return {}
        return {"cache_salt": hmac.new(self._secret, tenant.encode(), hashlib.sha256).hexdigest()}
