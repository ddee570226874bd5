"""A server without keys: whoever sits at this machine is its operator, until the first key is made."""

from __future__ import annotations

import httpx

from tests.api.worlds import ServedWorld


def test_the_first_key_closes_the_door_behind_it(world: ServedWorld, http: httpx.Client) -> None:
    assert http.get("/v1/models", headers={"Authorization": "Bearer none"}).status_code == 200
    made = http.post("/v1/keys", json={"name": "operator", "scopes": ["admin"]}).json()
    assert http.get("/v1/models").status_code == 401
    mine = {"Authorization": f"bearer {made['key']}"}
    assert http.get("/v1/models", headers=mine).status_code == 200
    assert http.post(f"/v1/keys/{made['id']}/revoke", headers=mine).status_code == 200
    assert http.get("/v1/models").status_code == http.get("/v1/models", headers=mine).status_code == 401
