"""Signs and verifies feedback links: tokens with an HMAC and an expiry time that permit one piece of feedback.

The server stores no links: a token contains everything it permits. Each is good for one piece of feedback, because it
posts under its own `feedback_id`, and an id stands for one body.
Invariant: the secret is in the data directory, readable by its owner alone; anyone who has it can create links.
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
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from memory.errors import StorageError
from runtime.errors import LinkExpired, LinkRefused

SECRET_NAME = "links.secret"
SECRET_BYTES = 32
PURPOSE = b"ratchet feedback link 1\n"
"""Prefix of the signed bytes: a signature for another purpose with the same secret is never valid for a link."""
MAX_TOKEN_CHARS = 8_192


@dataclass(frozen=True)
class Link:
    """The content of a token: permits one piece of feedback on one target."""

    feedback_id: str
    trajectory_id: str
    target: str
    expires_at: int
    """Seconds since 1970, UTC."""
    tenant: str = ""
    """The tenant of the key it was created with."""
    key_id: str | None = None
    """The API key it was created with: feedback through the link is trusted as much as feedback with that key."""
    user_id: str = ""
    """The person it is meant for."""
    answer_start: int | None = None
    step: int | None = None
    name: str = "reward"
    choices: tuple[str, ...] = ()
    """Categories to choose from; empty: good or not good."""
    may_correct: bool = False
    """Whether the form asks for the better answer, which the agent then learns."""


class LinkSigner:
    """Signs and verifies links with one secret of `SECRET_BYTES` bytes."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def sign(self, link: Link) -> str:
        """Return the link as a token for a URL. Raises: ValueError if it is longer than `MAX_TOKEN_CHARS`."""
        # Compared with each field's own default: step 0 and answer 0 equal False, and are no defaults.
        defaults = {each.name: each.default for each in fields(Link)}
        content = {key: value for key, value in asdict(link).items() if value != defaults[key]}
        body = _encode(json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode())
        token = f"{body}.{self._signature(body)}"
        if len(token) > MAX_TOKEN_CHARS:
            raise ValueError(f"a link on {link.target[:80]!r} would have {len(token)} characters: shorten its texts")
        return token

    def verify(self, token: str, *, now: float | None = None) -> Link:
        """Return the link of a token. `now` is in seconds since 1970, UTC.

        Raises:
            LinkRefused: this secret did not sign the token. LinkExpired: it did, but the link has expired.
        """
        # The length is limited before anything is computed: the token comes from strangers.
        body, _, signature = token[:MAX_TOKEN_CHARS].partition(".")
        # In constant time: otherwise the signature could be guessed byte by byte.
        if not hmac.compare_digest(signature.encode(), self._signature(body).encode()):
            raise LinkRefused("this link was not made here, or is not whole: copy all of it, or ask for another")
        # Only after the signature is verified: nothing else in the token is trusted.
        fields = json.loads(_decode(body))
        link = Link(**fields | {"choices": tuple(fields.get("choices", ()))})
        if (time.time() if now is None else now) >= link.expires_at:
            raise LinkExpired("the time of this link is over: ask for another")
        return link

    def _signature(self, body: str) -> str:
        return _encode(hmac.digest(self._secret, PURPOSE + body.encode(), hashlib.sha256))


def load_secret(directory: Path) -> bytes:
    """Return the secret of a data directory; the first call creates it.

    Raises:
        StorageError: it cannot be read or written.
    """
    path = directory / SECRET_NAME
    try:
        # No lock: routes call this on the event loop, one at a time, and a data directory has one owner.
        if not path.exists():
            _write_secret(path)
        path.chmod(0o600)  # a restored backup may have other permissions
        secret = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot use the links' secret {str(path)!r}: {error.strerror}; check the disk") from error
    if len(secret) != SECRET_BYTES:
        raise StorageError(f"the links' secret {str(path)!r} is damaged: delete it; links made so far end with it")
    return secret


def _write_secret(path: Path) -> None:
    # Renaming makes the file appear complete or not at all, also after a crash.
    partial = path.with_suffix(".unfinished")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(SECRET_BYTES))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError) as error:
        raise LinkRefused("this link is not whole: ask for another") from error
