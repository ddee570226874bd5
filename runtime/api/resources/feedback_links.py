"""Feedback from a browser, without a key: make a signed link, open it, post one piece.

How links are signed stands in `signed_links.py`. The routes under `/feedback/` are for whoever holds a
link; making one is for those who may post feedback.
Invariants: GET changes nothing, because previews of a link follow it; one link keeps one piece, and posting the same
again is answered the same.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Any, Self
from urllib.parse import parse_qs

from fastapi import APIRouter, Body, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field, model_validator

from memory.errors import FeedbackConflict
from memory.schema import Feedback, new_id
from runtime.api.errors import CREATED, OK, BadRequest, Conflict, Gone, NotFound, classify, error_responses
from runtime.api.gateway.permissions import RequestCaller
from runtime.api.resources.feedback import Target, find_target
from runtime.api.resources.feedback_page import HEADERS, MAX_CHARS, render_form, render_said
from runtime.api.resources.signed_links import Link, LinkSigner, load_secret
from runtime.api.services import Server, Services
from runtime.errors import LinkRefused

router = APIRouter(tags=["feedback"])

MAX_SECONDS = 90 * 24 * 3600
MAX_FORM_BYTES = 16 * MAX_CHARS
Choice = Annotated[str, Field(min_length=1, max_length=60)]


class LinkRequest(Target):
    """One link for one piece of feedback. Name what it is about as in `POST /v1/feedback`."""

    name: str = Field(default="reward", min_length=1, max_length=100, description="What is judged; shown on the page.")
    choices: list[Choice] = Field(
        default=[], max_length=10, description="Categories to choose among; without any, good or not good."
    )
    may_correct: bool = Field(
        default=False,
        description="Also ask what the answer should have been; learned if your key has the scope `teach`.",
    )
    user: str = Field(default="", max_length=200, description="Your name for the person whom the link is for.")
    expires_in_seconds: int = Field(default=7 * 24 * 3600, ge=1, le=MAX_SECONDS)

    @model_validator(mode="after")
    def _choices_differ(self) -> Self:
        if len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices repeat: {self.choices!r}")
        return self


class LinkAnswer(BaseModel):
    """The link. Whoever has it can post, so hand it to one person."""

    url: str = Field(description="As this server was addressed; behind a proxy, put `path` behind your own host.")
    path: str
    feedback_id: str = Field(description="Under which the piece will be kept.")
    expires_at: datetime


@router.post(
    "/v1/feedback/links",
    status_code=CREATED,
    summary="Make a link that takes one piece of feedback",
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
    """For a mail or a chat: it opens a page with buttons, no key asked. Links can't be taken back; they end by
    themselves."""
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
    path = f"/feedback/{signer_of(server).sign(link)}"
    return LinkAnswer(
        url=str(request.base_url).rstrip("/") + path,
        path=path,
        feedback_id=link.feedback_id,
        expires_at=datetime.fromtimestamp(link.expires_at, UTC),
    )


@router.get("/feedback/{token}", summary="The page of a link", response_class=HTMLResponse)
async def show_form(token: str, server: Server) -> HTMLResponse:
    """Shows the form. Changes nothing, however often it is opened."""
    try:
        link = signer_of(server).read(token)
    except LinkRefused as refused:
        return _refuse(refused)
    return HTMLResponse(render_form(link), headers=HEADERS)


@router.post(
    "/feedback/{token}",
    summary="Post the piece of feedback that a link allows",
    response_class=HTMLResponse,
    responses=error_responses(NotFound, Conflict, Gone),
)
async def post_form(token: str, server: Server, request: Request) -> HTMLResponse:
    """Keeps it, durably. The same again changes nothing; something else is refused: a link is for one piece."""
    try:
        link = signer_of(server).read(token)
        said = read_form(link, await _read_body(request))
        await server.memory.feedback.post(said)
    except FeedbackConflict:
        return _say("Already given", "This link has been used: each is for one piece of feedback.", Conflict.status)
    except (LinkRefused, BadRequest) as refused:
        return _refuse(refused)
    return _say("Thank you", "Your feedback was kept. You can close this page.", OK)


def read_form(link: Link, form: dict[str, str]) -> Feedback:
    """Return the feedback in a posted form.

    Raises:
        BadRequest: it says nothing, or what the link does not allow.
    """
    value: Any = form.get("value")
    allowed = set(link.choices) or {"true", "false"}
    if value is not None and value not in allowed:
        raise BadRequest(f"the value {value!r} is none of {sorted(allowed)!r}: use the buttons of the page")
    if value is not None and not link.choices:
        value = value == "true"
    comment, correction = (form.get(name, "").strip() or None for name in ("comment", "correction"))
    if correction is not None and not link.may_correct:
        raise BadRequest("this link does not ask for a correction: leave it out")
    if value is None and comment is None and correction is None:
        raise BadRequest("nothing was said: go back and press one of the buttons")
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


def signer_of(server: Services) -> LinkSigner:
    return LinkSigner(load_secret(server.memory.data_dir))


async def _read_body(request: Request) -> dict[str, str]:
    """Return the fields of a form. Of a field that is given twice, the last."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_FORM_BYTES:
            raise BadRequest(f"the form is larger than {MAX_FORM_BYTES} bytes: shorten it")
    try:
        fields = parse_qs(body.decode(), max_num_fields=10)
    except ValueError as error:
        raise BadRequest(f"the form cannot be read: {error}; use the page of the link") from error
    return {name: values[-1] for name, values in fields.items()}


def _refuse(problem: Exception) -> HTMLResponse:
    refusal = classify(problem)
    return _say("Not this time", str(refusal), refusal.status)


def _say(title: str, text: str, status: int) -> HTMLResponse:
    return HTMLResponse(render_said(title, text), status_code=status, headers=HEADERS)
