"""The picture of README: how long a training step takes, and what the same minutes of training give, on two CPUs.

Usage: python benchmarks/chart.py [docs/pictures/accuracy.png]

Everything in it comes from the tables `accuracy` and `accuracy-bf16`, which `tables.py` makes from the rows. The file
says in `Rows` which rows, and in `Points` what was drawn.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tables import accuracy_table, amx_table, results

from tokenseg.benchmark.frontier import Look, Panel, Point, drawn

HERE = Path(__file__).parent
ROWS = "benchmarks/accuracy_fp32.csv, benchmarks/accuracy.csv, benchmarks/accuracy_0016.csv"
NAMES = {
    "tokenseg": "TokenSeg small",
    "monai-unet": "MONAI UNet",
    "monai-segresnet": "MONAI SegResNet",
    "monai-dynunet": "MONAI DynUNet",
    "monai-swinunetr": "MONAI SwinUNETR",
    "nnunet-plainconv": "nnU-Net PlainConvUNet",
    "nnunet-resenc-m": "nnU-Net ResEnc M",
}
FLOOR = 0.7
LOOK = Look(
    "a training step, seconds",
    "Dice (bars: 95 % interval)",
    one_scale=True,
    makers=("TokenSeg", "MONAI", "nnU-Net"),
    panel_inch=(3.5, 3.7),
    dots_per_inch=200,
)


def panels() -> list[Panel]:
    """Both CPUs."""
    epyc, xeon = points(accuracy_table("accuracy_fp32")), points(amx_table())
    return [
        Panel("AMD EPYC, full precision", epyc, width=4, floor=FLOOR),
        Panel("Intel Xeon, half precision", xeon, width=5, floor=FLOOR),
    ]


def points(table: str) -> list[Point]:
    """Networks of a table of one budget in minutes: the seconds of a step follow from the steps that it gave."""
    (minutes,) = {float(found) for found in re.findall(r"([\d.]+) minutes", table)}
    found = [
        Point(NAMES[name], round(60 * minutes / result.steps, 3), result.dice, result.interval, short(NAMES[name]))
        for name, result in results(table).items()
    ]
    return sorted(found, key=lambda point: point.ms)


def short(name: str) -> str:
    """A name without its maker, whom the colour tells."""
    return name if name.startswith("TokenSeg") else name.split(" ", 1)[1]


def told(both: list[Panel]) -> str:
    """The points in words."""
    return "; ".join(
        f"{panel.title}: {point.network}, {point.ms} s, {point.value}" for panel in both for point in panel.points
    )


def picture() -> bytes:
    """The PNG file."""
    both = panels()
    return drawn(both, LOOK, {"Rows": ROWS, "Points": told(both)})


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "docs" / "pictures" / "accuracy.png"
    target.write_bytes(picture())
