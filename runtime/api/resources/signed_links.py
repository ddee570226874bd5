"""Links that let whoever holds one post one piece of feedback, without a key: signed, and over at a set time.

Refuses to know HTTP, and keeps no list of links: everything a link allows is in it, under an HMAC. That each is good
for one piece follows from its `feedback_id`, which it posts under: one id, one body.
Invariant: the secret is in the data directory, readable by its owner alone; who has it can make links.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from memory.errors import StorageError
from runtime.errors import LinkExpired, LinkRefused

SECRET_NAME = "links.secret"
SECRET_BYTES = 32
PURPOSE = b"ratchet feedback link 1\n"
"""Signed along, so that a signature for anything else is never one for a link."""
MAX_TOKEN_CHARS = 8_192


@dataclass(frozen=True)
class Link:
    """What one link allows: one piece of feedback on one thing."""

    feedback_id: str
    trajectory_id: str
    target: str
    expires_at: int
    """Seconds since 1970, UTC."""
    tenant: str = ""
    """Of whoever made it."""
    key_id: str | None = None
    """The API key it was made with: feedback through it counts for as much as feedback with that key."""
    user_id: str = ""
    """The person it was made for."""
    answer_start: int | None = None
    step: int | None = None
    name: str = "reward"
    choices: tuple[str, ...] = ()
    """Categories to choose among; empty: good or not good."""
    may_correct: bool = False
    """Whether its holder may write what the answer should have been, which the agent then learns."""


class LinkSigner:
    """Makes links and reads them, by one secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def sign(self, link: Link) -> str:
        """Return the link as a token for a URL. Raises ValueError for one that no URL should hold."""
        given = {key: value for key, value in asdict(link).items() if value not in (None, (), False, "")}
        body = _encode(json.dumps(given, separators=(",", ":"), ensure_ascii=False).encode())
        token = f"{body}.{self._seal(body)}"
        if len(token) > MAX_TOKEN_CHARS:
            raise ValueError(f"a link on {link.target[:80]!r} would have {len(token)} characters: shorten its texts")
        return token

    def read(self, token: str, *, now: float | None = None) -> Link:
        """Return what the token allows.

        Raises:
            LinkRefused: it was not made by this secret. LinkExpired: it was, and its time is over.
        """
        body, _, seal = token[:MAX_TOKEN_CHARS].partition(".")
        if not hmac.compare_digest(seal.encode(), self._seal(body).encode()):
            raise LinkRefused("this link was not made here, or is not whole: copy all of it, or ask for another")
        fields = json.loads(_decode(body))
        link = Link(**fields | {"choices": tuple(fields.get("choices", ()))})
        if (time.time() if now is None else now) >= link.expires_at:
            raise LinkExpired("the time of this link is over: ask for another")
        return link

    def _seal(self, body: str) -> str:
        return _encode(hmac.digest(self._secret, PURPOSE + body.encode(), hashlib.sha256))


def load_secret(directory: Path) -> bytes:
    """Return the secret of a data directory, made at the first call.

    Raises:
        StorageError: it cannot be read or written.
    """
    path = directory / SECRET_NAME
    try:
        if not path.exists():
            _write_secret(path)
        path.chmod(0o600)  # also after a restored backup
        secret = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot use the links' secret {str(path)!r}: {error.strerror}; check the disk") from error
    if len(secret) != SECRET_BYTES:
        raise StorageError(f"the links' secret {str(path)!r} is damaged: delete it; links made so far end with it")
    return secret


def _write_secret(path: Path) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(SECRET_BYTES))
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError) as error:
        raise LinkRefused("this link is not whole: ask for another") from error
