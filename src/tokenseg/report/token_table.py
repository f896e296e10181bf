"""The tokens of the cases shown, in numbers."""

from __future__ import annotations

from collections.abc import Sequence

from tokenseg.report.markup import Html, element, join
from tokenseg.report.page import Section
from tokenseg.report.scores import scrollable
from tokenseg.tokens.boundary import NearBoundary
from tokenseg.tokens.find import ShownTokens
from tokenseg.tokens.report import LEVEL_NAMES, RADII_MM, TokenSummary

_EXPLAINED = (
    "The network describes a scan by candidate tokens, one a cell of a coarse grid at four levels of detail, and keeps "
    "the most important ones. Shares are of the kept tokens whose cell lies within that distance of the boundary; in "
    "brackets the share of all candidates, which a choice by chance would reach. Cells are large, so compare the two, "
    "not the share alone. Choose Tokens in the viewer above to see the cells."
)


def tokens_section(reports: Sequence[ShownTokens], anchor: str = "tokens", title: str = "Tokens kept") -> Section:
    """A row a case and model: how near the kept tokens lie to the boundary, their levels, and the codebook.

    Args:
        reports: One a case and model.
        anchor: `id` of the section.
        title: Its heading.
    """
    near = (f"Within {radius:g} mm" if radius else "On the boundary" for radius in RADII_MM)
    several = len({report.model_name for report in reports}) > 1
    names = ("Case", "Model", "Boundary of") if several else ("Case", "Boundary of")
    numbers = ("Kept", *near, *(f"Level {name}" for name in LEVEL_NAMES), "Codes used")
    cells = [element("th", name, scope="col") for name in names]
    cells += [element("th", name, scope="col", class_="number") for name in numbers]
    rows = (_row(report.case_id, report.model_name if several else "", report.summary) for report in reports)
    table = element("table", element("thead", element("tr", *cells)), element("tbody", *rows))
    return Section(anchor, title, join((scrollable(table, title), element("p", _EXPLAINED, class_="help"))))


def _row(case_id: str, model_name: str, summary: TokenSummary) -> Html:
    near = map(_share, summary.near) if summary.near else ["n/a"] * len(RADII_MM)
    codes = "none" if summary.codebook is None else f"{summary.codebook.used} of {summary.codebook.entries}"
    numbers = (
        f"{summary.num_kept} of {summary.num_candidates - summary.num_in_padding}",
        *near,
        *map(str, summary.kept_per_level),
        codes,
    )
    cells = (element("td", number, class_="number") for number in numbers)
    model = element("td", model_name) if model_name else ""
    return element("tr", element("th", case_id, scope="row"), model, element("td", summary.boundary_of), *cells)


def _share(near: NearBoundary) -> str:
    return f"{near.share:.0%} ({near.base_rate:.0%})"
