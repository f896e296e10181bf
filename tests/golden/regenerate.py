"""The loss curve of a short training, and how its committed copy is made again after a deliberate change:

cd tests && python -m golden.regenerate
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path
from unittest.mock import patch

from phantoms import write_msd
from tokenseg.options import TrainOptions
from tokenseg.training.csv_log import read_log
from tokenseg.training.train import train

CURVE = Path(__file__).with_name("loss_curve.csv")
COLUMNS = ("step", "loss", "segmentation")
NUM_STEPS = 20
# Low, so that rounding, which differs between processors, stays below the tolerance: a token that falls to another
# code is a jump.
CONFIG = """
[plan]
batch_size = 2
[train]
learning_rate = 5e-4
"""


def train_shortly(folder: Path) -> list[dict[str, str]]:
    """Train `tiny` in float32 on one thread on a two-label phantom; rows of the log."""
    dataset = write_msd(folder / "data", 5, shape=(24, 20, 20), labels={1: "outer", 2: "inner"})
    config = folder / "config.toml"
    config.write_text(CONFIG)
    options = TrainOptions(preset="tiny", max_steps=NUM_STEPS, config=config, device="cpu", threads=1)
    with patch("tokenseg.training.launch.bfloat16_helps", lambda _: False):
        train(dataset, folder / "run", options)
    return read_log(folder / "run" / "log.csv")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = train_shortly(Path(folder))
    with CURVE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
