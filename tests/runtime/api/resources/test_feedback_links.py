"""Feedback on answers, and from a browser without a key."""

from __future__ import annotations

import stat
import time
from dataclasses import replace
from html.parser import HTMLParser

import httpx
import pytest

from memory.errors import StorageError
from memory.store import Memory
from runtime.api.resources.signed_links import SECRET_NAME, Link, LinkSigner, load_secret
from runtime.errors import LinkExpired, LinkRefused
from tests.runtime.api.gateway.test_routes import ask
from tests.runtime.api.worlds import ServedWorld

LINK = Link(
    feedback_id="link_1",
    trajectory_id="trj_1",
    target="trj_1",
    expires_at=2_000_000_000,
    choices=("a", "b"),
    key_id="key_1",
    user_id="anna",
)


class Form(HTMLParser):
    """A page as a browser parses it: buttons, fields and tags, which show whether anything is run or loaded."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.buttons: list[str] = []
        self.fields: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        if tag == "button":
            self.buttons.append(given["value"])
        if tag == "textarea":
            self.fields.append(given["name"])


def make(http: httpx.Client, **body) -> dict:
    answer = http.post("/v1/feedback/links", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


def said_of(memory: Memory, trajectory_id: str) -> list[tuple]:
    return [(it.value, it.comment, it.correction, it.source) for it in memory.feedback.select(trajectory_id)]


def test_a_link_reads_as_it_was_signed():
    signer = LinkSigner(b"1" * 32)
    assert signer.verify(signer.sign(LINK), now=1_999_999_999) == LINK
    with pytest.raises(LinkExpired):
        signer.verify(signer.sign(LINK), now=2_000_000_000)


def test_no_changed_link_is_read():
    signer, token = LinkSigner(b"1" * 32), LinkSigner(b"1" * 32).sign(LINK)
    with pytest.raises(LinkRefused):
        LinkSigner(b"2" * 32).verify(token)
    for place in range(0, len(token), 7):
        changed = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
        with pytest.raises(LinkRefused):
            signer.verify(changed)
    for nonsense in ("", ".", "a.b", token[:-1], f"{token}=", "é.é", "x" * 100_000):
        with pytest.raises(LinkRefused):
            signer.verify(nonsense)


def test_the_secret_is_kept_for_its_owner_alone(tmp_path):
    secret, path = load_secret(tmp_path), tmp_path / SECRET_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(secret) == 32
    path.chmod(0o644)
    assert load_secret(tmp_path) == secret and stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(b"")
    with pytest.raises(StorageError, match="is damaged"):
        load_secret(tmp_path)


def test_opening_a_link_changes_nothing_and_posting_keeps_one_piece(world: ServedWorld, http: httpx.Client):
    trajectory_id = ask(http)
    link = make(http, target=trajectory_id)
    assert link["url"] == world.url + link["path"]
    for _ in range(3):
        page = http.get(link["path"])
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    form = Form(page.text)
    assert (form.buttons, form.fields) == (["true", "false"], ["comment"])
    assert said_of(world.memory, trajectory_id) == []

    first = http.post(link["path"], data={"value": "true", "comment": " helpful "})
    again = http.post(link["path"], data={"value": "true", "comment": "helpful"})
    other = http.post(link["path"], data={"value": "false"})
    assert (first.status_code, again.status_code, other.status_code) == (200, 200, 409)
    assert "Already given" in other.text
    assert said_of(world.memory, trajectory_id) == [(True, "helpful", None, "link")]
    assert world.memory.trajectories.effective_reward(trajectory_id) == 1.0


def test_the_page_runs_nothing_loads_nothing_and_escapes_everything(http: httpx.Client):
    nasty = "<script>alert(1)</script>"
    page = http.get(make(http, target=ask(http), name=nasty, choices=['"><img src=x>', "fine"])["path"])
    form = Form(page.text)
    assert form.buttons == ['"><img src=x>', "fine"]
    assert not form.tags & {"script", "img", "link", "iframe"}
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["referrer-policy"] == "no-referrer" and page.headers["cache-control"] == "no-store"


def test_a_link_takes_only_what_it_asks_for(world: ServedWorld, http: httpx.Client):
    trajectory_id = ask(http)
    path = make(http, target=trajectory_id, choices=["late", "wrong"])["path"]
    for form in ({}, {"value": "true"}, {"value": "late", "correction": "May 2"}, {"comment": "x" * 8_001}):
        assert http.post(path, data=form).status_code == 400
    assert http.post(path, content=b"a" * 200_000).status_code == 400
    assert http.post(path, content=b"value=%ff&a&b" * 10).status_code == 400
    assert said_of(world.memory, trajectory_id) == []
    assert http.post(path, data={"value": "late"}).status_code == 200
    assert said_of(world.memory, trajectory_id) == [("late", None, None, "link")]


def test_a_link_may_ask_for_the_better_answer(world: ServedWorld, http: httpx.Client):
    trajectory_id = ask(http)
    path = make(http, target=trajectory_id, may_correct=True)["path"]
    assert Form(http.get(path).text).fields == ["comment", "correction"]
    http.post(path, data={"value": "false", "correction": "May 2"})
    (correction,) = world.memory.feedback.corrections(limit=10)
    assert (correction.trajectory.id, correction.text, correction.step.position) == (trajectory_id, "May 2", 0)


def test_a_link_that_is_over_or_broken_says_so(world: ServedWorld, http: httpx.Client):
    path = make(http, target=ask(http), expires_in_seconds=1)["path"]
    time.sleep(1.1)
    assert http.get(path).status_code == http.post(path, data={"value": "true"}).status_code == 410
    broken = http.get(path[:-2])
    assert broken.status_code == 404 and "copy all of it" in broken.text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"target": "trj_none"}, 404),
        ({}, 400),
        ({"target": "x", "choices": ["a", "a"]}, 400),
        ({"target": "x", "expires_in_seconds": 10**9}, 400),
    ],
)
def test_a_link_that_cannot_be_is_not_made(http: httpx.Client, body: dict, status: int):
    assert http.post("/v1/feedback/links", json=body).status_code == status


def test_many_long_choices_fit_and_what_does_not_fit_is_refused(http: httpx.Client):
    choices = [f"{number}" + "🍲" * 59 for number in range(10)]
    assert Form(http.get(make(http, target=ask(http), choices=choices)["path"]).text).buttons == choices
    with pytest.raises(ValueError, match="shorten its texts"):
        LinkSigner(b"1" * 32).sign(replace(LINK, target="e" * 8_192))


def test_links_outlive_a_restart(world: ServedWorld, http: httpx.Client):
    token = make(http, target=ask(http))["path"].rpartition("/")[2]
    assert LinkSigner(load_secret(world.memory.data_dir)).verify(token).feedback_id.startswith("link_")


def test_a_link_on_the_first_step_or_answer_stays_one():
    signer = LinkSigner(b"1" * 32)
    for link in (replace(LINK, step=0), replace(LINK, answer_start=0), replace(LINK, step=0, may_correct=True)):
        assert signer.verify(signer.sign(link)) == link


def test_feedback_on_one_step_is_kept_and_shown(world: ServedWorld, http: httpx.Client):
    trajectory_id = ask(http)
    body = {"target": trajectory_id, "step": 0, "value": False, "source": "code", "tags": {"rule": "7"}}
    assert http.post("/v1/feedback", json=body).status_code == 201
    (shown,) = http.get(f"/v1/trajectories/{trajectory_id}").json()["feedback"]
    assert (shown["target"], shown["step"], shown["value"]) == (trajectory_id, 0, False)
    assert world.memory.trajectories.rewards(trajectory_id) == []
    missing = http.post("/v1/feedback", json=body | {"step": 5})
    assert missing.status_code == 404 and "no step 5" in missing.json()["error"]["message"]


def test_a_retry_is_the_same_row_even_when_its_episode_went_on(world: ServedWorld, http: httpx.Client):
    first_id = ask(http, episode_id="e1")
    body = {"episode_id": "e1", "value": 0.5, "id": "mine", "comment": "so so"}
    first = http.post("/v1/feedback", json=body)
    ask(http, episode_id="e1")
    again = http.post("/v1/feedback", json=body)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == {"feedback_id": "mine", "trajectory_id": first_id, "is_new": False}


@pytest.mark.parametrize("value", [True, 0.25, 1, "billing", "It was, on the whole, fine."])
def test_bools_numbers_categories_and_texts_come_back_as_they_were(http: httpx.Client, value):
    trajectory_id = ask(http)
    http.post("/v1/feedback", json={"target": trajectory_id, "name": "verdict", "value": value})
    (shown,) = http.get(f"/v1/trajectories/{trajectory_id}").json()["feedback"]
    assert shown["value"] == value and type(shown["value"]) is type(value)
