"""The page and its markup: escaping, well-formedness, the policy, and that nothing points outside."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenseg.about import NOTICE
from tokenseg.errors import FileError
from tokenseg.report.markup import Html, data_block, element, join
from tokenseg.report.page import Section, write_page

EVIL = "<img src=x onerror=alert(1)> \"' & </script><!--"


class Outline(HTMLParser):
    """Checks that tags are balanced, and keeps attributes and texts."""

    void = frozenset({"br", "input", "meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1))
def test_text_and_attributes_come_back_as_they_were(text):
    outline = Outline(element("p", text, title=text))
    assert outline.tags == [("p", {"title": text})]
    assert "".join(outline.texts) == text


def test_html_is_taken_as_it_is_and_text_is_not():
    assert element("p", element("b", "a<b"), "<i>") == "<p><b>a&lt;b</b>&lt;i&gt;</p>"
    assert join(["<", Html("<br>")]) == "&lt;<br>"


def test_attribute_names_and_values():
    assert element("input", class_="a", data_value=0.25, checked=True, hidden=False, id=None) == (
        '<input class="a" data-value="0.25" checked>'
    )


def test_data_block_cannot_be_ended_from_within():
    block = data_block({"id": EVIL}, "case")
    assert block.count("</script>") == 1
    assert json.loads(re.fullmatch("<script[^>]*>(.*)</script>", block)[1]) == {"id": EVIL}


@pytest.fixture
def page(tmp_path):
    def make(title: str = EVIL) -> str:
        path = tmp_path / "report.html"
        write_page(path, title, element("p", EVIL), [Section("one", EVIL, element("p", "body"))], "2026-01-02")
        return path.read_text(encoding="utf-8")

    return make


def test_page_is_complete_and_escaped(page):
    text = page()
    outline = Outline(text)
    assert text.startswith("<!DOCTYPE html>")
    assert outline.attributes("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in outline.attributes("meta")
    assert outline.attributes("img") == []
    assert outline.texts.count(EVIL) == 5  # title, heading, lead, link, heading of the section
    assert sum(NOTICE in text for text in outline.texts) == 2  # head and foot
    assert any("2026-01-02" in text for text in outline.texts)
    assert "#one" in [attributes.get("href") for attributes in outline.attributes("a")]


def test_nothing_points_outside(page):
    text = page("title")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace(EVIL, ""))
    for tag, attributes in Outline(text).tags:
        assert tag not in {"link", "iframe", "object"}
        assert "src" not in attributes
        assert "style" not in attributes  # the policy would refuse it


def test_policy_names_the_hashes_of_our_own_style_and_script_only(page):
    text = page("title")
    policy = next(
        attributes["content"]
        for attributes in Outline(text).attributes("meta")
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    for tag in ("style", "script"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_same_arguments_give_the_same_bytes(page):
    assert page() == page()


def test_unwritable_place_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match=r"cannot write .*report\.html"):
        write_page(tmp_path / "file" / "report.html", "t", Html(""), [], "today")
