"""API keys: made, known again, revoked. What is kept of one is a digest, so that a stolen database opens no door.

This module refuses to know how a key is presented, and what a scope opens. A key is 256 random bits, so one SHA-256 is
as good as a slow hash; and whoever times the look-up learns about digests, which say nothing of any key.

Invariants: a key is told once, by `create`; a revoked one is as unknown as one that never was; where a key was ever
made, keys are required from then on, even when all are revoked.
"""

from __future__ import annotations

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

PREFIX = "ratchet_"  # so that scanners of code and logs know one when they see one
MAX_LIMIT = 2**31 - 1  # what an INTEGER column of PostgreSQL holds; SQLite would take 2**63 - 1
NOTED_EVERY = timedelta(minutes=1)
FRESH_SECONDS = 5.0


class Keys:
    """All keys ever made."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # In memory, because each request asks. Another process on the same database may make and revoke keys too.
        self._by_digest: dict[str, ApiKey] = {}
        self._was_any_made = False
        self._learned_at = 0.0
        self._noted_at: dict[str, datetime] = {}
        self._learn_rows()

    @property
    def is_required(self) -> bool:
        """Whether any key was ever made."""
        self._refresh()
        return self._was_any_made

    async def create(
        self,
        name: str,
        scopes: Iterable[str],
        *,
        tenant: str = "",
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key; return its row, and the key itself, which nobody can tell again.

        Raises: ValueError for a blank name, an unknown scope or none, a tenant's name or a limit that cannot be.
        """
        limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
        values, key = _new_key(name, scopes, tenant=tenant, **limits)
        row = await self._database.write(lambda session: _add(session, values))
        self._learn_rows()
        return row, key

    async def create_for_operator(
        self, name: str, scopes: Iterable[str], **more: Any
    ) -> tuple[tuple[ApiKey, str], tuple[ApiKey, str] | None]:
        """Make a key as `create` does, and beside it an operator's key where none is in force: from the first key on
        everybody needs one, so without an operator's nobody could make, list or revoke keys over HTTP again.

        Return (row, key) of the first, and of the second where it was made.
        """
        values, key = _new_key(name, scopes, **more)
        spare_values, spare_key = _new_key("operator", [Scope.ADMIN])

        def write(session: Session) -> tuple[ApiKey, ApiKey | None]:
            row = _add(session, values)
            return row, None if _operator_keys(session) else _add(session, spare_values)

        row, spare = await self._database.write(write)
        self._learn_rows()
        return (row, key), None if spare is None else (spare, spare_key)

    async def revoke(self, key_id: str) -> ApiKey:
        """Have a key open nothing from now on; revoked already is no error.

        Raises: UnknownKey; LastOperatorKey for the last key in force with which keys can be managed.
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
        self._learn_rows()
        return row

    def select(self) -> list[ApiKey]:
        """Return all keys, revoked ones too, oldest first."""
        with self._database.read() as session:
            return list(session.exec(select(ApiKey).order_by(col(ApiKey.id))))

    def find(self, key: str) -> ApiKey | None:
        """Return the row of a key that is in force, here at once, and elsewhere after `FRESH_SECONDS` at the latest;
        None for any other text.
        """
        self._refresh()
        return self._by_digest.get(digest(key))

    async def note_use(self, row: ApiKey) -> None:
        """Keep when a key was last used, to the minute. Raises: StorageError."""
        moment, before = now(), self._noted_at.get(row.id, row.last_used_at)
        if before is not None and moment - before < NOTED_EVERY:
            return
        self._noted_at[row.id] = moment
        await self._database.write(
            lambda session: session.execute(update(ApiKey).where(col(ApiKey.id) == row.id).values(last_used_at=moment))
        )

    def _refresh(self) -> None:
        if time.monotonic() - self._learned_at > FRESH_SECONDS:
            with contextlib.suppress(StorageError):  # what was known stays known
                self._learn_rows()

    def _learn_rows(self) -> None:
        self._learned_at = time.monotonic()
        rows = self.select()
        self._by_digest = {row.digest: row for row in rows if row.revoked_at is None}
        self._was_any_made = bool(rows)


def digest(key: str) -> str:
    """Return what is kept of a key: its SHA-256, in hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _new_key(
    name: str,
    scopes: Iterable[str],
    *,
    tenant: str = "",
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
) -> tuple[dict[str, Any], str]:
    """Return (values of its row, key) of a key that is not stored yet. Raises: ValueError."""
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
    """Return the keys in force that can manage keys: those of the default tenant with the scope admin."""
    in_force = select(ApiKey).where(col(ApiKey.revoked_at).is_(None), ApiKey.tenant == "")
    return [row for row in session.exec(in_force) if Scope.ADMIN in row.scopes]


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
