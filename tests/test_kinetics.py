"""Contrast kinetics against a differential equation, and the signal against hand-computed steady states."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from tokenseg.synthetic.kinetics import (
    BLOOD,
    HAEMATOCRIT,
    TISSUES,
    Exchange,
    Sequence,
    plasma_concentration_mm,
    signal,
    tissue_concentration_mm,
)

SEQUENCE = Sequence(field_strength_t=1.5, repetition_ms=5.0, flip_degrees=13.0, post_contrast_s=(90.0, 240.0))


def at(*minutes):
    return plasma_concentration_mm(np.array(minutes, dtype=np.float64))


def test_arterial_input_has_the_published_peak_and_tail():
    # First pass: its peak is area / (width sqrt(2 pi)), with the bolus of 0.1 mmol/kg at about 6 mmol/l of blood.
    fine = np.linspace(0, 1, 2001)
    peak_min = fine[plasma_concentration_mm(fine).argmax()]
    assert peak_min == pytest.approx(0.17046, abs=0.005)
    assert at(peak_min)[0] * (1 - HAEMATOCRIT) == pytest.approx(0.809 / (0.0563 * math.sqrt(2 * math.pi)), rel=0.1)
    assert at(5.0)[0] * (1 - HAEMATOCRIT) == pytest.approx(1.050 * math.exp(-0.1685 * 5), rel=1e-3)
    assert at(-0.1)[0] == 0


@pytest.mark.parametrize(("transfer", "extracellular", "plasma"), [(0.3, 0.3, 0.04), (0.05, 0.4, 0.0), (0.6, 0.2, 0.1)])
def test_exchange_solves_its_differential_equation(transfer, extracellular, plasma):
    def flow(minute, amount):
        return transfer * (at(minute)[0] - amount / extracellular)

    solved = solve_ivp(flow, (0, 5), [0.0], t_eval=[1.5, 4.0], max_step=0.005)
    expected = solved.y[0] + plasma * at(1.5, 4.0)
    exchange = Exchange(transfer_per_min=transfer, extracellular=extracellular, plasma=plasma)
    np.testing.assert_allclose(tissue_concentration_mm(exchange, (90.0, 240.0)), expected, rtol=0.01)


def test_blood_holds_its_share_of_plasma():
    expected = (1 - HAEMATOCRIT) * at(1.5, 4.0)
    np.testing.assert_allclose(tissue_concentration_mm(BLOOD, (90.0, 240.0)), expected, rtol=1e-3)


def test_lesions_wash_out_and_gland_goes_on_rising():
    lesion = tissue_concentration_mm(Exchange(transfer_per_min=0.25, extracellular=0.25, plasma=0.04), (90.0, 240.0))
    gland = tissue_concentration_mm(Exchange(transfer_per_min=0.03, extracellular=0.4, plasma=0.01), (90.0, 240.0))
    assert lesion[1] < 0.85 * lesion[0]
    assert gland[1] > 1.2 * gland[0]


def test_signal_at_a_right_angle_is_saturation_recovery():
    sequence = Sequence(field_strength_t=3.0, repetition_ms=500.0, flip_degrees=90.0, post_contrast_s=(90.0,))
    assert signal(sequence, "gland", np.zeros(1))[0] == pytest.approx(0.85 * (1 - math.exp(-500 / 1445)))


def test_signal_is_largest_at_the_ernst_angle():
    recovery = math.exp(-5 / TISSUES["muscle"].t1_ms[1.5])
    ernst = math.degrees(math.acos(recovery))

    def muscle(flip):
        sequence = Sequence(field_strength_t=1.5, repetition_ms=5.0, flip_degrees=flip, post_contrast_s=(90.0,))
        return signal(sequence, "muscle", np.zeros(1))[0]

    assert muscle(ernst) > max(muscle(ernst - 0.5), muscle(ernst + 0.5))


def test_signal_shortens_t1_by_the_relaxivity():
    # 0.4 mmol/l at 4.1 l/mmol/s: 1 / (1 / 1.250 + 1.64) = 0.40984 s
    with_agent = signal(SEQUENCE, "lesion", np.array([0.4]))[0]
    recovery, angle = math.exp(-0.005 / 0.409836), math.radians(13)
    assert with_agent == pytest.approx(0.9 * math.sin(angle) * (1 - recovery) / (1 - math.cos(angle) * recovery))


def test_signal_keeps_the_type_and_shape_of_a_map():
    amounts = np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    image = signal(SEQUENCE, "lesion", amounts)
    assert (image.dtype, image.shape) == (np.float32, (2, 3, 4))
    assert (np.diff(image.ravel()) > 0).all()
