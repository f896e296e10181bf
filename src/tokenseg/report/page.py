"""The page around the sections: head, notice, style and script inside, and a policy that forbids any network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tokenseg.about import NOTICE, __version__
from tokenseg.files import write_atomically
from tokenseg.report.markup import Html, element, join


@dataclass(frozen=True)
class Section:
    """One part of a page, with a heading of its own and a link at the top."""

    anchor: str
    """Its `id`: lower-case letters and dashes, unique on the page."""
    title: str
    body: Html


def write_page(path: Path, title: str, lead: Html, sections: Sequence[Section], made: str) -> None:
    """Write one HTML file that needs no other file and no network.

    Args:
        path: The file; replaced if it is there.
        title: Heading and title of the page.
        lead: What comes first: a sentence with the result, and the key figures.
        sections: In the order of reading.
        made: Date, or date and time, for the footer; the same arguments give the same bytes.

    Raises:
        FileError: The file cannot be written.
    """
    style, script = _asset("report.css"), join((_asset("viewer.js"), _asset("report.js")))
    body = (
        element("a", "Skip to content", class_="skip", href="#content"),
        element("header", element("h1", title), element("p", NOTICE, class_="notice"), _links(sections)),
        element("main", element("div", lead, class_="lead"), *map(_section, sections), id="content"),
        element("footer", element("p", f"Made by tokenseg {__version__}, {made}. {NOTICE}")),
        element("div", class_="tip", role="status", hidden=True),
        element("script", script),
    )
    head = (
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", style),
    )
    page = element("html", element("head", *head), element("body", *body), lang="en")
    write_atomically(path, f"<!DOCTYPE html>\n{page}\n".encode())


def _asset(name: str) -> Html:
    return Html(files("tokenseg.report").joinpath("assets", name).read_text(encoding="utf-8"))


def _policy(style: str, script: str) -> str:
    """Only our own style and script run, known by their hashes; everything else, network included, is refused."""
    return (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _links(sections: Sequence[Section]) -> Html:
    links = (element("a", section.title, href=f"#{section.anchor}") for section in sections)
    return element("nav", *links, aria_label="Sections")


def _section(section: Section) -> Html:
    heading = element("h2", section.title, id=f"{section.anchor}-title")
    return element(
        "section", join((heading, section.body)), id=section.anchor, aria_labelledby=f"{section.anchor}-title"
    )
