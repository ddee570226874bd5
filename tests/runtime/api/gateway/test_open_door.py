"""A server without keys: any user of this machine is its operator, until the first key is created."""

from __future__ import annotations

import httpx
import pytest

from tests.runtime.api.worlds import ServedWorld


def test_the_first_key_closes_the_door_behind_it(world: ServedWorld, http: httpx.Client) -> None:
    assert http.get("/v1/models", headers={"Authorization": "Bearer none"}).status_code == 200
    made = http.post("/v1/keys", json={"name": "operator", "scopes": ["admin"]}).json()
    assert http.get("/v1/models").status_code == 401
    mine = {"Authorization": f"bearer {made['key']}"}
    assert http.get("/v1/models", headers=mine).status_code == 200
    refused = http.post(f"/v1/keys/{made['id']}/revoke", headers=mine)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "last_operator_key")
    another = http.post("/v1/keys", json={"name": "operator", "scopes": ["admin"]}, headers=mine).json()
    assert http.post(f"/v1/keys/{made['id']}/revoke", headers=mine).status_code == 200
    assert http.get("/v1/models").status_code == http.get("/v1/models", headers=mine).status_code == 401
    theirs = {"Authorization": f"bearer {another['key']}"}
    assert http.get("/v1/models", headers=theirs).status_code == 200


def test_a_first_key_for_a_client_does_not_lock_the_operator_out(world: ServedWorld, http: httpx.Client) -> None:
    made = http.post("/v1/keys", json={"name": "shop", "scopes": ["infer"]}).json()
    assert made["scopes"] == ["infer"] and made["operator"]["scopes"] == ["admin"]
    mine, theirs = ({"Authorization": f"Bearer {it['key']}"} for it in (made["operator"], made))
    assert http.get("/v1/keys", headers=theirs).status_code == 403
    listed = http.get("/v1/keys", headers=mine).json()["data"]
    assert {row["id"] for row in listed} == {made["id"], made["operator"]["id"]}


@pytest.mark.parametrize("limit", ["requests_per_minute", "tokens_per_minute"])
@pytest.mark.parametrize("value", [2**31, 2**63, 10**30])
def test_a_limit_that_no_row_holds_is_refused(http: httpx.Client, limit: str, value: int) -> None:
    answer = http.post("/v1/keys", json={"name": "shop", "scopes": ["infer"], limit: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, limit)
