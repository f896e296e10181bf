"""The report on the tokens of one case: which candidates were kept, how near to a boundary, and why.

Made by `tokenseg.tokens.find`; printed (`describe_tokens`), written (`write_json`) or drawn
(`tokenseg.tokens.picture`).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from tokenseg.config import NUM_LEVELS
from tokenseg.files import write_atomically
from tokenseg.shapes import BoolMask
from tokenseg.tokens.boundary import NearBoundary, near_boundary
from tokenseg.tokens.case import CaseTokens

RADII_MM = (0.0, 2.0, 5.0)
"""How far from the boundary a token still counts as near it."""
LEVEL_NAMES = ("1/2", "1/4", "1/8", "1/16")
TERM_NAMES = ("boundary", "semantic", "diversity", "score")
"""The three terms of the importance score, and the score."""


class TermMeans(NamedTuple):
    """Mean of one term over the tokens with a voxel of the scan; NaN where there are none."""

    kept: float
    all: float


class CodebookUse(NamedTuple):
    """How much of the codebook the tokens of one case use, kept or not."""

    entries: int
    used: int
    """Distinct codes."""
    perplexity: float
    """exp of the entropy of their shares: 1 where all tokens have one code, `used` where all are as frequent."""


@dataclass(frozen=True)
class TokenSummary:
    """The tokens of one case in numbers."""

    boundary_of: Literal["reference", "prediction"]
    """Whose boundary `near` is about."""
    near: tuple[NearBoundary, ...]
    """One an entry of `RADII_MM`; none where the mask is empty or full and so has no boundary."""
    num_passes: int
    num_candidates: int
    """Over all passes, those in padding with them."""
    num_in_padding: int
    """Candidates whose cell lies wholly outside what the network saw of the scan."""
    num_kept: int
    kept_per_level: tuple[int, ...]
    """In the order of `LEVEL_NAMES`."""
    terms: dict[str, TermMeans]
    """By `TERM_NAMES`."""
    codebook: CodebookUse | None
    """None for a model without a codebook."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values for JSON, None where a number is not defined."""
        if self.near:
            near = [{name: _number(value) for name, value in each._asdict().items()} for each in self.near]
        else:
            near = [dict.fromkeys(NearBoundary._fields) | {"radius_mm": radius_mm} for radius_mm in RADII_MM]
        codebook = None
        if self.codebook is not None:
            codebook = self.codebook._asdict() | {"used_fraction": self.codebook.used / self.codebook.entries}
        return {
            "passes": self.num_passes,
            "candidates": self.num_candidates,
            "in_padding": self.num_in_padding,
            "kept": self.num_kept,
            "kept_per_level": dict(zip(LEVEL_NAMES, self.kept_per_level, strict=True)),
            "boundary_of": self.boundary_of,
            "near_boundary": near,
            "terms": {
                name: {"kept": _number(each.kept), "all": _number(each.all)} for name, each in self.terms.items()
            },
            "codebook": codebook,
        }


@dataclass(frozen=True, eq=False)
class TokenReport:
    """All that `tokenseg tokens` tells, shows and writes of one case.

    Attributes:
        case_id: Name of the case.
        model_name: Name of the model; of several that segment together, with its number.
        tokens: The tokens.
        summary: Their numbers.
        distance_mm: Distance of each token's box to the boundary, 0 where the boundary passes through it, infinite
            beyond the largest of `RADII_MM`; None where there is no boundary.
        image: What a picture shows beneath: the network's first channel, or its first difference of channels where it
            has one, since a subtraction image is where a lesion shows. RAS+ axes, stored intensities.
        reference: Reference foreground in RAS+ axes, if one was given.
    """

    case_id: str
    model_name: str
    tokens: CaseTokens
    summary: TokenSummary
    distance_mm: Float[np.ndarray, "T N"] | None
    image: Float[np.ndarray, "X Y Z"]
    reference: BoolMask | None

    def to_json(self) -> dict[str, Any]:
        """Give plain values for JSON: the summary, and one entry a candidate under `tokens`."""
        record = self.tokens.record
        return {
            "case": self.case_id,
            "model": self.model_name,
            **self.summary.to_json(),
            "shape_vox": list(record.canonical_shape),
            "spacing_mm": list(record.spacing_mm),
            "tokens": [self._token(*place) for place in np.ndindex(self.tokens.kept.shape)],
        }

    def _token(self, number: int, index: int) -> dict[str, Any]:
        tokens, place = self.tokens, (number, index)
        distance_mm = None if self.distance_mm is None else _number(round(float(self.distance_mm[place]), 3))
        return {
            "pass": number,
            "level": LEVEL_NAMES[tokens.level[index]],
            "box_vox": np.round(tokens.boxes_vox[place], 3).tolist(),
            "in_padding": not tokens.in_scan[place],
            "kept": bool(tokens.kept[place]),
            "distance_mm": distance_mm,
            **{name: round(float(getattr(tokens, name)[place]), 6) for name in TERM_NAMES},
            "code": int(tokens.code[place]) if tokens.num_codes else None,
        }


def summarise_tokens(
    tokens: CaseTokens, distance_mm: Float[np.ndarray, "T N"] | None, boundary_of: Literal["reference", "prediction"]
) -> TokenSummary:
    """Put the tokens of a case into numbers.

    Args:
        tokens: Of the case.
        distance_mm: Distance of each token's box to the boundary; None where there is no boundary.
        boundary_of: Whose boundary that is.
    """
    in_scan = tokens.in_scan
    near: tuple[NearBoundary, ...] = ()
    if distance_mm is not None:
        near = tuple(near_boundary(distance_mm, tokens.kept, in_scan, radius_mm) for radius_mm in RADII_MM)
    terms = {}
    for name in TERM_NAMES:
        values = getattr(tokens, name)
        terms[name] = TermMeans(kept=_mean(values[in_scan & tokens.kept]), all=_mean(values[in_scan]))
    return TokenSummary(
        boundary_of=boundary_of,
        near=near,
        num_passes=len(tokens.kept),
        num_candidates=tokens.kept.size,
        num_in_padding=int((~in_scan).sum()),
        num_kept=int(tokens.kept.sum()),
        kept_per_level=tuple(int(tokens.kept[:, tokens.level == level].sum()) for level in range(NUM_LEVELS)),
        terms=terms,
        codebook=_codebook_use(tokens) if tokens.num_codes else None,
    )


def write_json(path: Path, report: TokenReport) -> None:
    """Write a report as JSON, one candidate a line.

    Raises:
        FileError: The file cannot be written.
    """
    values = report.to_json()
    lines = ",\n  ".join(json.dumps(token) for token in values.pop("tokens"))
    head = json.dumps(values, indent=1).removesuffix("\n}")
    write_atomically(path, f'{head},\n "tokens": [\n  {lines}\n ]\n}}\n'.encode())


def describe_tokens(report: TokenReport) -> str:
    """Give the short table that the command line prints."""
    summary = report.summary
    levels = ", ".join(f"{name}: {count}" for name, count in zip(LEVEL_NAMES, summary.kept_per_level, strict=True))
    passes = f" in {summary.num_passes} windows" if summary.num_passes > 1 else ""
    lines = [f"{report.case_id}: {summary.num_kept} of {summary.num_candidates} tokens kept{passes} ({levels})"]
    if summary.num_in_padding:
        lines.append(f"{summary.num_in_padding} cells lie outside the scan, in padding")
    lines += ["", *_near_lines(summary), "", f"{'mean of':<20} {'kept':>7} {'all':>7}"]
    lines += [f"{name:<20} {means.kept:>7.3f} {means.all:>7.3f}" for name, means in summary.terms.items()]
    lines.append("")
    if summary.codebook is None:
        lines.append("codebook: none in this model")
    else:
        entries, used, perplexity = summary.codebook
        lines.append(f"codebook: {used} of {entries} entries used, perplexity {perplexity:.1f}")
    return "\n".join(lines) + "\n"


def _codebook_use(tokens: CaseTokens) -> CodebookUse:
    _, counts = np.unique(tokens.code[tokens.in_scan], return_counts=True)
    share = counts / counts.sum()
    return CodebookUse(tokens.num_codes, len(counts), float(np.exp(-(share * np.log(share)).sum())))


def _near_lines(summary: TokenSummary) -> list[str]:
    if not summary.near:
        return [f"the {summary.boundary_of} is empty or fills the scan: there is no boundary to be near"]
    lines = [f"{'near ' + summary.boundary_of:<20} {'kept':>7} {'all':>7} {'enrichment':>11} {'ceiling':>8}"]
    for near in summary.near:
        what = f"within {near.radius_mm:g} mm" if near.radius_mm else "crossed by it"
        rates = f"{near.share:>7.1%} {near.base_rate:>7.1%} {near.enrichment:>11.2f} {near.ceiling:>8.1%}"
        lines.append(f"{what:<20} {rates}")
    return lines


def _mean(values: Float[np.ndarray, " n"]) -> float:
    return float(values.mean(dtype=np.float64)) if values.size else float("nan")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
