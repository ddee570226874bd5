"""HTML pages behind a signed link: a form without scripts, and a page with a message.

Invariants: the pages show nothing of the episode, because a link may be forwarded; every inserted text is escaped; the
pages load no resources.
"""

from __future__ import annotations

from html import escape

from runtime.api.resources.signed_links import Link

HEADERS = {
    # The URL contains the token: the page may post to its own origin only, and sends no referrer.
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "X-Robots-Tag": "noindex",
    "X-Content-Type-Options": "nosniff",
}
MAX_CHARS = 8_000
STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 34rem; margin: 3rem auto; padding: 0 1rem; color: #222 }
label { display: block; margin: 1rem 0 } textarea { width: 100%; min-height: 5rem; font: inherit }
button { font: inherit; padding: .5rem 1.2rem; margin: 0 .5rem .5rem 0; cursor: pointer }
"""


def render_form(link: Link) -> str:
    """Return the page with the form."""
    options = [(choice, choice) for choice in link.choices] or [("true", "Good"), ("false", "Not good")]
    buttons = "".join(
        f'<button name="value" value="{escape(value)}">{escape(label)}</button>' for value, label in options
    )
    fields = _text_field("comment", "Anything to add?")
    if link.may_correct:
        fields += _text_field("correction", "What should the answer have been?")
    title = "How was the answer?" if link.name == "reward" else f"How was the answer: {link.name}?"
    return _page(title, f'<form method="post">{fields}{buttons}</form>')


def render_message(title: str, text: str) -> str:
    """Return a page with a title and a text."""
    return _page(title, f"<p>{escape(text)}</p>")


def _text_field(name: str, label: str) -> str:
    return f'<label>{label}<textarea name="{name}" maxlength="{MAX_CHARS}"></textarea></label>'


def _page(title: str, content: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{content}</body></html>"
    )
