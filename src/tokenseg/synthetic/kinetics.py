"""Contrast agent in the signal: arterial input, exchange with tissue, relaxation, spoiled gradient echo.

Sources: arterial input, Parker et al. 2006 (Magn Reson Med 56:993); exchange, extended Tofts model, Tofts et al. 1999
(J Magn Reson Imaging 10:223); relaxivity of gadopentetate in plasma, Rohrer et al. 2005 (Invest Radiol 40:715); T1 of
breast tissue, Rakow-Penner et al. 2006 (J Magn Reson Imaging 23:87); T1 of muscle, heart, liver and blood, Stanisz et
al. 2005 (Magn Reson Med 54:507). T1 of skin, bone and tumour, proton densities and exchange constants are our own
choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

TissueName: TypeAlias = Literal["fat", "gland", "muscle", "heart", "liver", "blood", "skin", "bone", "lesion"]
Curve: TypeAlias = Float[np.ndarray, " n"]

HAEMATOCRIT = 0.42
RELAXIVITY_PER_MM_S: dict[float, float] = {1.5: 4.1, 3.0: 3.7}
_STEP_MIN = 1 / 120  # resolves the first pass, whose width is 3.4 s


class Tissue(NamedTuple):
    """What a tissue is before contrast agent comes.

    Attributes:
        t1_ms: Longitudinal relaxation time by field strength in tesla.
        proton_density: Relative to water.
    """

    t1_ms: dict[float, float]
    proton_density: float


TISSUES: dict[TissueName, Tissue] = {
    "fat": Tissue({1.5: 296, 3.0: 367}, 0.95),
    "gland": Tissue({1.5: 1266, 3.0: 1445}, 0.85),
    "muscle": Tissue({1.5: 1008, 3.0: 1412}, 0.80),
    "heart": Tissue({1.5: 1030, 3.0: 1471}, 0.80),
    "liver": Tissue({1.5: 576, 3.0: 812}, 0.75),
    "blood": Tissue({1.5: 1441, 3.0: 1932}, 0.90),
    "skin": Tissue({1.5: 900, 3.0: 1150}, 0.70),
    "bone": Tissue({1.5: 400, 3.0: 480}, 0.15),
    "lesion": Tissue({1.5: 1250, 3.0: 1480}, 0.90),
}


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """How contrast agent enters and leaves a tissue (extended Tofts model)."""

    transfer_per_min: float
    """K^trans: from plasma into the extravascular extracellular space."""
    extracellular: float
    """v_e: share of that space; K^trans / v_e is the rate of return, so a small one washes out."""
    plasma: float = 0.0
    """v_p: share of plasma in the tissue."""


BLOOD = Exchange(transfer_per_min=0.0, extracellular=1.0, plasma=1 - HAEMATOCRIT)


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """A three-dimensional spoiled gradient echo and its phases."""

    field_strength_t: float
    """1.5 or 3."""
    repetition_ms: float
    flip_degrees: float
    post_contrast_s: tuple[float, ...]
    """Time from the arrival of contrast agent to the middle of k-space of each phase after it."""


def plasma_concentration_mm(times_min: Curve) -> Curve:
    """Contrast agent in the plasma of an artery after 0.1 mmol/kg (population average), in mmol/l.

    Args:
        times_min: Minutes since its arrival; earlier ones give 0.

    Returns:
        Concentration in plasma: that in whole blood over one minus the haematocrit.
    """
    first = _bump(times_min, 0.809, 0.17046, 0.0563)
    second = _bump(times_min, 0.330, 0.365, 0.132)
    tail = 1.050 * np.exp(-0.1685 * times_min) / (1 + np.exp(-38.078 * (times_min - 0.483)))
    blood: Curve = np.where(times_min < 0, 0.0, first + second + tail)
    return blood / (1 - HAEMATOCRIT)


def tissue_concentration_mm(exchange: Exchange, times_s: tuple[float, ...]) -> Curve:
    """Contrast agent in a tissue at some times after its arrival in the artery, in mmol/l of tissue.

    Args:
        exchange: The tissue.
        times_s: Seconds since arrival, not negative.
    """
    times_min: Curve = np.arange(0, max(times_s) / 60 + 2 * _STEP_MIN, _STEP_MIN)
    plasma = plasma_concentration_mm(times_min)
    residue = np.exp(-exchange.transfer_per_min / exchange.extracellular * times_min)
    exchanged = np.convolve(plasma, residue)[: len(times_min)] * _STEP_MIN
    concentration = exchange.plasma * plasma + exchange.transfer_per_min * exchanged
    return np.interp(np.array(times_s) / 60, times_min, concentration)


def signal(
    sequence: Sequence, tissue: TissueName, concentration_mm: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """Signal of a tissue in the steady state of a spoiled gradient echo, T2* left out.

    Args:
        sequence: How it is scanned.
        tissue: What is scanned.
        concentration_mm: Contrast agent in it, in mmol/l, not negative.

    Returns:
        Signal relative to the full transverse magnetisation of water.
    """
    properties = TISSUES[tissue]
    rate_per_s = (
        1000 / properties.t1_ms[sequence.field_strength_t]
        + RELAXIVITY_PER_MM_S[sequence.field_strength_t] * concentration_mm
    )
    recovery = np.exp(-sequence.repetition_ms / 1000 * rate_per_s)
    angle = math.radians(sequence.flip_degrees)
    result: Float[np.ndarray, "*shape"] = (
        properties.proton_density * math.sin(angle) * (1 - recovery) / (1 - math.cos(angle) * recovery)
    )
    return result


def _bump(times_min: Curve, area: float, centre_min: float, width_min: float) -> Curve:
    result: Curve = np.exp(-((times_min - centre_min) ** 2) / (2 * width_min**2))
    return area / (width_min * math.sqrt(2 * math.pi)) * result
