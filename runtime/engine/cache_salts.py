"""Salts that separate the tenants' parts of the engine's prefix cache.

vLLM answers faster when the beginning of a prompt is in its cache. Without salts, the response time would tell one
tenant whether another has sent the same prompt.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets


class CacheSalts:
    """One secret salt per tenant, fixed for the life of this object; the cache lives no longer than that."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def for_tenant(self, tenant: str) -> dict[str, str]:
        """Return the parameters to add to a tenant's model calls; none for the default tenant."""
        if not tenant:
            return {}
        # Hex, because vLLM takes at most 128 characters, and no `@`, `/` or backslash.
        return {"cache_salt": hmac.new(self._secret, tenant.encode(), hashlib.sha256).hexdigest()}
