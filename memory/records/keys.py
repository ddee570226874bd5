"""API keys: created, looked up, revoked. Only a digest of a key is stored, so that a stolen database grants no access.

A key is 256 random bits, so one SHA-256 is as good as a slow hash, and the timing of the look-up reveals only digests.

Invariants: a key is shown once, by `create`; a revoked key is treated like an unknown one; once a key was created, keys
are required, even when all are revoked.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import update
from sqlmodel import Session, col, select

from memory.errors import LastOperatorKey, StorageError, UnknownKey
from memory.names import check_name_or_empty
from memory.schema import ApiKey, Scope, new_id, now
from memory.storage.database import Database

PREFIX = "ratchet_"  # lets secret scanners recognise a key in code and logs
MAX_LIMIT = 2**31 - 1  # of an INTEGER column in PostgreSQL; SQLite would accept 2**63 - 1
NOTED_EVERY = timedelta(minutes=1)
FRESH_SECONDS = 5.0


class Keys:
    """All API keys, cached in memory."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # Cached, because each request looks a key up. Another process may change keys: see `refresh`.
        self._by_digest: dict[str, ApiKey] = {}
        self._has_any = False
        self._num_begun = self._num_taken = 0
        self._noted_at: dict[str, datetime] = {}
        self._loaded_at = time.monotonic()
        self._take(self.select())

    @property
    def is_required(self) -> bool:
        """Whether a key was ever created."""
        return self._has_any

    async def create(
        self,
        name: str,
        scopes: Iterable[str],
        *,
        tenant: str = "",
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> tuple[ApiKey, str]:
        """Create a key; return (its row, the key itself, which cannot be read again).

        Raises: ValueError for a blank name, an unknown scope or none, an invalid tenant or limit.
        """
        limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
        values, key = _new_key(name, scopes, tenant=tenant, **limits)
        row = await self._database.write(lambda session: _add(session, values))
        await self._reload()
        return row, key

    async def create_for_operator(
        self, name: str, scopes: Iterable[str], **more: Any
    ) -> tuple[tuple[ApiKey, str], tuple[ApiKey, str] | None]:
        """Create a key as `create` does, and an operator's key where none is active.

        From the first key on every request needs one, so without an operator's key nobody could manage keys over HTTP.
        Return (row, key) of the first key, and of the operator's key or None.
        """
        values, key = _new_key(name, scopes, **more)
        # Made outside the transaction, which may run twice.
        spare_values, spare_key = _new_key("operator", [Scope.ADMIN])

        def write(session: Session) -> tuple[ApiKey, ApiKey | None]:
            row = _add(session, values)
            return row, None if _operator_keys(session) else _add(session, spare_values)

        row, spare = await self._database.write(write)
        await self._reload()
        return (row, key), None if spare is None else (spare, spare_key)

    async def revoke(self, key_id: str) -> ApiKey:
        """Revoke a key; revoking it again changes nothing.

        Raises: UnknownKey; LastOperatorKey for the last active key that can manage keys.
        """

        def write(session: Session) -> ApiKey:
            row = session.get(ApiKey, key_id)
            if row is None:
                raise UnknownKey(f"no key has the id {key_id!r}: list them to see which exist")
            if [each.id for each in _operator_keys(session)] == [key_id]:
                raise LastOperatorKey(
                    f"key {key_id!r} ({row.name!r}) is the last one that can manage keys: make another with the scope "
                    "admin in the default tenant, then revoke this one"
                )
            row.revoked_at = row.revoked_at or now()
            session.add(row)
            session.flush()
            return row

        row = await self._database.write(write)
        await self._reload()
        return row

    def select(self) -> list[ApiKey]:
        """Return all keys, including revoked ones, oldest first."""
        with self._database.read() as session:
            return list(session.exec(select(ApiKey).order_by(col(ApiKey.id))))

    def find(self, key: str) -> ApiKey | None:
        """Return the row of an active key; None for any other text.

        A change by this process is visible at once, a change by another process after a `refresh`.
        """
        return self._by_digest.get(digest(key))

    async def note_use(self, row: ApiKey) -> None:
        """Store the time of a key's last use, to the minute. Raises: StorageError."""
        moment, before = now(), self._noted_at.get(row.id, row.last_used_at)
        if before is not None and moment - before < NOTED_EVERY:
            return
        self._noted_at[row.id] = moment  # before the await: concurrent requests write once
        await self._database.write(
            lambda session: session.execute(update(ApiKey).where(col(ApiKey.id) == row.id).values(last_used_at=moment))
        )

    async def refresh(self) -> None:
        """Read the keys again if that was done more than `FRESH_SECONDS` ago: another process may have changed them."""
        if time.monotonic() - self._loaded_at > FRESH_SECONDS:
            with contextlib.suppress(StorageError):  # the cached keys stay valid
                await self._reload()

    async def _reload(self) -> None:
        """Read all keys, off the event loop: there may be thousands."""
        # before the read: while it lasts and while the database is down, other requests go on with the cached keys
        self._loaded_at = time.monotonic()
        self._num_begun += 1
        number = self._num_begun
        rows = await asyncio.to_thread(self.select)
        # A read that began earlier must not undo one that knows a key that was made or revoked since.
        if number > self._num_taken:
            self._num_taken = number
            self._take(rows)

    def _take(self, rows: list[ApiKey]) -> None:
        self._by_digest = {row.digest: row for row in rows if row.revoked_at is None}
        self._has_any = bool(rows)


def digest(key: str) -> str:
    """Return the SHA-256 of a key, in hex."""
    # A header may hold any bytes, so the text may have lone surrogates.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _new_key(
    name: str,
    scopes: Iterable[str],
    *,
    tenant: str = "",
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
) -> tuple[dict[str, Any], str]:
    """Return (values of the row, key) for a new key, without storing it. Raises: ValueError."""
    key = PREFIX + secrets.token_hex(32)
    values = {
        "id": new_id("key"),
        "digest": digest(key),
        "name": _check_name(name),
        "tenant": _check_tenant(tenant),
        "scopes": _check_scopes(scopes),
        "requests_per_minute": _check_limit("requests_per_minute", requests_per_minute),
        "tokens_per_minute": _check_limit("tokens_per_minute", tokens_per_minute),
    }
    return values, key


def _add(session: Session, values: dict[str, Any]) -> ApiKey:
    row = ApiKey(**values)
    session.add(row)
    session.flush()
    return row


def _operator_keys(session: Session) -> list[ApiKey]:
    """Return the active keys that can manage keys: those of the default tenant with the scope admin."""
    active = select(ApiKey).where(col(ApiKey.revoked_at).is_(None), ApiKey.tenant == "")
    return [row for row in session.exec(active) if Scope.ADMIN in row.scopes]


def _check_name(name: str) -> str:
    tidy = " ".join(name.split())
    if not 1 <= len(tidy) <= 200:
        raise ValueError(f"a key needs a name of up to 200 characters, not {name[:80]!r}: say who will use it")
    return tidy


def _check_tenant(tenant: str) -> str:
    try:
        return check_name_or_empty(tenant)
    except ValueError:
        raise ValueError(
            f"a tenant is up to 64 letters, digits, '.', '_' and '-', not {tenant!r}; '' is the default"
        ) from None


def _check_scopes(scopes: Iterable[str]) -> list[str]:
    given = list(dict.fromkeys(scopes))
    known = [scope.value for scope in Scope]
    strays = [scope for scope in given if scope not in known]
    if strays or not given:
        what = f"{strays[0]!r} is no scope" if strays else "a key without a scope opens nothing"
        raise ValueError(f"{what}: choose among {', '.join(known)}")
    return [scope for scope in known if scope in given]


def _check_limit(name: str, value: int | None) -> int | None:
    if value is not None and not 1 <= value <= MAX_LIMIT:
        raise ValueError(f"{name} is a number from 1 to {MAX_LIMIT}, not {value!r}: leave it out for no limit")
    return value
