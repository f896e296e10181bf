"""HTML that escapes by construction: text is escaped when it becomes part of an element, elements are not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape

_VOID = {"br", "input", "meta"}


class Html(str):
    """Text that is HTML already. Only `element`, `join` and `data_block` make it; all other text gets escaped."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | float | int | None) -> Html:
    """Build one element.

    Args:
        name: Tag name, such as `td`.
        children: Text, escaped, or `Html`, taken as it is.
        attributes: Values are escaped. `_` becomes `-`, and a last `_` is dropped (`class_`, `aria_label`). True gives
            the bare name; None and False leave the attribute out.
    """
    written = "".join(_attribute(key.removesuffix("_").replace("_", "-"), value) for key, value in attributes.items())
    closing = "" if name in _VOID else f"{join(children)}</{name}>"
    return Html(f"<{name}{written}>{closing}")


def join(parts: Iterable[str]) -> Html:
    """Join text, escaped, and `Html`, without anything between."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def data_block(values: object, class_: str) -> Html:
    """A `<script type="application/json">` that no browser runs; `<` is written so that it cannot end early.

    Raises:
        ValueError: A number is NaN or infinite, which JSON does not have.
    """
    text = json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return element("script", Html(text), type_="application/json", class_=class_)


def _attribute(name: str, value: str | float | int | None) -> str:
    if value is None or value is False:
        return ""
    if value is True:
        return f" {name}"
    return f' {name}="{escape(f"{value:.6g}" if isinstance(value, float) else str(value))}"'
