"""Routes for feedback without an API key: create a signed link, open its page, post the page's form.

Creating a link needs the scope `feedback`; the routes under `/feedback/` need only the link (see `signed_links.py`).
Invariants: GET changes nothing, because chat and mail programs follow links for previews. A link stores one piece of
feedback; posting the same form again gives the same answer.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Self
from urllib.parse import parse_qs

from fastapi import APIRouter, Body, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field, model_validator

from memory.errors import FeedbackConflict
from memory.schema import Feedback, new_id
from runtime.api.errors import CREATED, OK, BadRequest, Conflict, Gone, NotFound, classify, error_responses
from runtime.api.gateway.permissions import RequestCaller
from runtime.api.resources.feedback import Target, find_target
from runtime.api.resources.feedback_page import HEADERS, MAX_CHARS, render_form, render_message
from runtime.api.resources.signed_links import Link, LinkSigner, load_secret
from runtime.api.services import Server, Services
from runtime.errors import LinkRefused

router = APIRouter(tags=["feedback"])

MAX_SECONDS = 90 * 24 * 3600
MAX_FORM_BYTES = 16 * MAX_CHARS  # two texts of MAX_CHARS, percent-encoded
Choice = Annotated[str, Field(min_length=1, max_length=60)]


class LinkRequest(Target):
    """A link for one piece of feedback, with a target as in `POST /v1/feedback`."""

    name: str = Field(
        default="reward", min_length=1, max_length=100, description="The rated property; shown on the page."
    )
    choices: list[Choice] = Field(
        default=[], max_length=10, description="Categories to choose from; without any, good or not good."
    )
    may_correct: bool = Field(
        default=False,
        description="Also ask for the better answer; it is learned if your key has the scope `teach`.",
    )
    user: str = Field(default="", max_length=200, description="Your id of the person who gets the link.")
    expires_in_seconds: int = Field(default=7 * 24 * 3600, ge=1, le=MAX_SECONDS)

    @model_validator(mode="after")
    def _choices_differ(self) -> Self:
        if len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices repeat: {self.choices!r}")
        return self


class LinkAnswer(BaseModel):
    """The link. Everybody who has it can post, so send it to one person only."""

    url: str = Field(description="With the host of this request; behind a proxy, append `path` to your own host.")
    path: str
    feedback_id: str = Field(description="The id under which the feedback will be stored.")
    expires_at: datetime


@router.post(
    "/v1/feedback/links",
    status_code=CREATED,
    summary="Create a link for one piece of feedback",
    responses=error_responses(NotFound),
)
async def make_link(
    server: Server,
    caller: RequestCaller,
    request: Request,
    body: Annotated[
        LinkRequest, Body(openapi_examples={"thumbs": {"summary": "Good or not", "value": {"target": "trj_0199..."}}})
    ],
) -> LinkAnswer:
    """For mail or chat: the link opens a page with buttons and needs no key. A link cannot be revoked; it expires."""
    link = Link(
        feedback_id=new_id("link"),
        expires_at=int(time.time()) + body.expires_in_seconds,
        name=body.name,
        choices=tuple(body.choices),
        may_correct=body.may_correct,
        tenant=caller.tenant,
        key_id=caller.key_id,
        user_id=body.user,
        **find_target(body, server.memory, caller.tenant),
    )
    path = f"/feedback/{load_signer(server).sign(link)}"
    return LinkAnswer(
        # From the Host header, which `OriginCheck` has allowed; otherwise a forged one would put foreign links into
        # mails.
        url=str(request.base_url).rstrip("/") + path,
        path=path,
        feedback_id=link.feedback_id,
        expires_at=datetime.fromtimestamp(link.expires_at, UTC),
    )


@router.get("/feedback/{token}", summary="The page of a link", response_class=HTMLResponse)
async def show_form(token: str, server: Server) -> HTMLResponse:
    """Shows the form. Opening it changes nothing."""
    try:
        link = load_signer(server).verify(token)
    except LinkRefused as error:
        return _error_page(error)
    return HTMLResponse(render_form(link), headers=HEADERS)


@router.post(
    "/feedback/{token}",
    summary="Post the form of a link",
    response_class=HTMLResponse,
    responses=error_responses(NotFound, Conflict, Gone),
)
async def post_form(token: str, server: Server, request: Request) -> HTMLResponse:
    """Stores the feedback durably. The same form again changes nothing, another one is a conflict: a link is for one
    piece."""
    try:
        link = load_signer(server).verify(token)
        # The body of a stranger is parsed only after the link was verified.
        feedback = parse_form(link, await _read_fields(request))
        await server.memory.feedback.post(feedback)
    except FeedbackConflict:
        message = "This link has been used: each is for one piece of feedback."
        return _message_page("Already given", message, Conflict.status)
    except (LinkRefused, BadRequest) as error:
        return _error_page(error)
    return _message_page("Thank you", "Your feedback was kept. You can close this page.", OK)


def parse_form(link: Link, fields: dict[str, str]) -> Feedback:
    """Return the feedback row of a posted form.

    Raises:
        BadRequest: the form is empty, or has a value that the link does not permit.
    """
    value = _parse_value(link, fields.get("value"))
    comment, correction = (fields.get(name, "").strip() or None for name in ("comment", "correction"))
    if correction is not None and not link.may_correct:
        raise BadRequest("this link does not ask for a correction: leave it out")
    if value is None and comment is None and correction is None:
        raise BadRequest("the form is empty: go back and press one of the buttons")
    if any(len(text or "") > MAX_CHARS for text in (comment, correction)):
        raise BadRequest(f"a text is longer than {MAX_CHARS} characters: shorten it")
    return Feedback(
        tenant=link.tenant,
        key_id=link.key_id,
        user_id=link.user_id,
        id=link.feedback_id,
        trajectory_id=link.trajectory_id,
        target=link.target,
        answer_start=link.answer_start,
        step=link.step,
        name=link.name,
        value=value,
        comment=comment,
        correction=correction,
        source="link",
    )


def _parse_value(link: Link, text: str | None) -> bool | str | None:
    if text is None:
        return None
    # Again on the server: the buttons of the page bind nobody.
    allowed = set(link.choices) or {"true", "false"}
    if text not in allowed:
        raise BadRequest(f"the value {text!r} is none of {sorted(allowed)!r}: use the buttons of the page")
    return text if link.choices else text == "true"


def load_signer(server: Services) -> LinkSigner:
    """Return the signer for this data directory; the first call creates its secret. Raises: StorageError."""
    return LinkSigner(load_secret(server.memory.data_dir))


async def _read_fields(request: Request) -> dict[str, str]:
    """Return the fields of a posted form; the last value wins. Raises: BadRequest."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_FORM_BYTES:
            raise BadRequest(f"the form is larger than {MAX_FORM_BYTES} bytes: shorten it")
    try:
        # Not `request.form()`, which would accept file uploads too and write them to disk.
        fields = parse_qs(body.decode(), max_num_fields=10)
    except ValueError as error:
        raise BadRequest(f"the form cannot be read: {error}; use the page of the link") from error
    return {name: values[-1] for name, values in fields.items()}


def _error_page(error: Exception) -> HTMLResponse:
    api_error = classify(error)
    return _message_page("Not this time", str(api_error), api_error.status)


def _message_page(title: str, text: str, status: int) -> HTMLResponse:
    return HTMLResponse(render_message(title, text), status_code=status, headers=HEADERS)
