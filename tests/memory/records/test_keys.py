"""API keys: their storage, look-up and revocation."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from memory.config import MemoryConfig
from memory.errors import DataDirectoryInUse, LastOperatorKey, UnknownKey
from memory.records import keys as keys_module
from memory.records.keys import PREFIX, Keys, digest
from memory.schema import ApiKey, now
from memory.storage.database import Database
from memory.store import open_keys


@pytest.fixture
def keys(database: Database) -> Keys:
    return Keys(database)


async def test_a_key_is_told_once_and_only_its_digest_is_kept(tmp_path: Path):
    with open_keys(tmp_path) as keys:
        row, key = await keys.create("shop", ["infer"])
        assert key.startswith(PREFIX) and len(key) == len(PREFIX) + 64
        assert row.digest == digest(key) and keys.find(key) == row
        kept = b"".join(path.read_bytes() for path in tmp_path.glob("ratchet.db*"))
        assert row.digest.encode() in kept and key.removeprefix(PREFIX).encode() not in kept


async def test_a_revoked_key_is_as_unknown_as_one_that_never_was(keys: Keys):
    row, key = await keys.create("shop", ["infer"])
    revoked = await keys.revoke(row.id)
    again = await keys.revoke(row.id)
    assert revoked.revoked_at is not None and again.revoked_at == revoked.revoked_at
    assert keys.find(key) is None and keys.find("") is None
    with pytest.raises(UnknownKey, match="'key_no'"):
        await keys.revoke("key_no")


async def test_once_a_key_was_made_keys_are_required_for_good(keys: Keys, database: Database):
    assert not keys.is_required
    row, _ = await keys.create("shop", ["infer"])
    await keys.revoke(row.id)
    assert keys.is_required and Keys(database).is_required


async def test_keys_are_known_again_after_a_restart(keys: Keys, database: Database):
    row, key = await keys.create(" the  shop ", ["feedback", "infer", "infer"], tenant="acme", tokens_per_minute=5)
    found = Keys(database).find(key)
    assert (found.id, found.name, found.tenant) == (row.id, "the shop", "acme")
    assert (found.scopes, found.requests_per_minute, found.tokens_per_minute) == (["infer", "feedback"], None, 5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": " "}, "needs a name"),
        ({"scopes": ["infer", "fly"]}, "'fly' is no scope: choose among infer"),
        ({"scopes": []}, "without a scope opens nothing"),
        ({"tenant": "../x"}, r"not '\.\./x'"),
        ({"tenant": "a\n"}, "a tenant is"),
        ({"tokens_per_minute": 0}, "tokens_per_minute is a number from 1 to"),
        ({"requests_per_minute": 2**31}, f"not {2**31}"),
        ({"tokens_per_minute": 2**63}, f"not {2**63}"),
    ],
)
async def test_a_key_that_cannot_be_is_refused_by_name(keys: Keys, given: dict, said: str):
    with pytest.raises(ValueError, match=said):
        await keys.create(**{"name": "shop", "scopes": ["infer"]} | given)
    assert keys.select() == []


@pytest.mark.parametrize(
    ("scopes", "tenant"), [(["infer"], ""), (["infer", "feedback", "learn", "teach"], ""), (["admin"], "acme")]
)
async def test_a_first_key_that_cannot_manage_keys_brings_an_operators_key(keys: Keys, scopes: list, tenant: str):
    (row, key), (operator, operators_key) = await keys.create_for_operator("shop", scopes, tenant=tenant)
    assert keys.find(key).id == row.id and keys.find(operators_key).id == operator.id
    assert (operator.scopes, operator.tenant) == (["admin"], "")
    assert (await keys.create_for_operator("page", ["feedback"]))[1] is None
    assert len(keys.select()) == 3


async def test_an_operators_own_first_key_is_enough(keys: Keys):
    (row, _), spare = await keys.create_for_operator("me", ["admin"])
    assert spare is None and [each.id for each in keys.select()] == [row.id]


async def test_the_last_operators_key_is_not_revoked(keys: Keys):
    first, _ = await keys.create("me", ["admin"])
    await keys.create("acme's", ["admin"], tenant="acme")
    shop, _ = await keys.create("shop", ["infer"])
    with pytest.raises(LastOperatorKey, match=f"{first.id!r}.*make another"):
        await keys.revoke(first.id)
    assert (await keys.revoke(shop.id)).revoked_at is not None
    second, key = await keys.create("me again", ["admin"])
    assert (await keys.revoke(first.id)).revoked_at is not None
    with pytest.raises(LastOperatorKey):
        await keys.revoke(second.id)
    assert keys.find(key) is not None


async def test_the_last_use_is_kept_to_the_minute(keys: Keys, monkeypatch: pytest.MonkeyPatch):
    row, _ = await keys.create("shop", ["infer"])
    began = now()
    for seconds in (0, 10, 59, 61):
        monkeypatch.setattr(keys_module, "now", lambda seconds=seconds: began + timedelta(seconds=seconds))
        await keys.note_use(row)
    (kept,) = keys.select()
    assert kept.last_used_at == began + timedelta(seconds=61)
    assert keys._noted_at[row.id] == kept.last_used_at


async def test_a_key_is_revoked_elsewhere_too_within_seconds(
    keys: Keys, database: Database, monkeypatch: pytest.MonkeyPatch
):
    elsewhere = Keys(database)
    row, key = await keys.create("shop", ["infer"])
    assert elsewhere.find(key) is None and not elsewhere.is_required
    await elsewhere.refresh()
    assert elsewhere.find(key) is None  # they were read just now
    elsewhere._loaded_at -= keys_module.FRESH_SECONDS
    await elsewhere.refresh()
    assert elsewhere.find(key) == row and elsewhere.is_required
    await keys.revoke(row.id)
    elsewhere._loaded_at -= keys_module.FRESH_SECONDS
    await elsewhere.refresh()
    assert elsewhere.find(key) is None


async def test_a_slow_read_does_not_bring_a_revoked_key_back(keys: Keys, monkeypatch: pytest.MonkeyPatch):
    await keys.create("me", ["admin"])
    row, key = await keys.create("shop", ["infer"])
    select, has_read, may_return = keys.select, threading.Event(), threading.Event()

    def read_slowly() -> list[ApiKey]:
        rows = select()
        has_read.set()
        assert may_return.wait(10)
        return rows

    monkeypatch.setattr(keys, "select", read_slowly)
    keys._loaded_at -= keys_module.FRESH_SECONDS + 1
    slow = asyncio.create_task(keys.refresh())
    assert await asyncio.to_thread(has_read.wait, 10)
    monkeypatch.setattr(keys, "select", select)
    await keys.revoke(row.id)
    assert keys.find(key) is None
    may_return.set()
    await slow
    assert keys.find(key) is None


async def test_keys_are_made_without_a_server_but_never_beside_one(tmp_path: Path, config: MemoryConfig):
    with open_keys(tmp_path, config) as keys:
        await keys.create("shop", ["admin"])
        with pytest.raises(DataDirectoryInUse, match="in use by process"), open_keys(tmp_path, config):
            pass
    with open_keys(tmp_path, config) as keys:
        assert [row.name for row in keys.select()] == ["shop"]
