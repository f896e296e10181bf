"""Train one network on one fold through TokenSeg's pipeline and append its validation figures to a CSV.

    python benchmarks/accuracy.py DATASET RUN --network tokenseg|tokenseg-off|monai-unet \
        [--max-minutes M | --max-steps S] [--threads T] [--seed N] [--csv benchmarks/accuracy.csv]

All networks share data, split, augmentation, loss, optimiser, budget and evaluation; only the network differs.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from tokenseg.config import NetworkConfig, Plan, TrainOptions
from tokenseg.device import bfloat16_helps
from tokenseg.model.network import TokenSeg
from tokenseg.peers import monai_unet
from tokenseg.terminal import Terminal
from tokenseg.train import TrainResult, train
from tokenseg.training.journal import read_journal

COLUMNS = (
    *("date", "commit", "dataset", "network", "fold", "seed", "steps", "budget", "threads", "precision"),
    *("parameters_m", "label", "n", "n_missed", "dice", "dice_low", "dice_high", "hd95_mm", "nsd_1mm", "train_s"),
)


def main() -> None:
    """Parse, train, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--network", choices=["tokenseg", "tokenseg-off", "monai-unet"], default="tokenseg")
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--fold", type=lambda text: text if text == "all" else int(text), default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--resume", action="store_true", help="go on with RUN, or validate it again if it is finished")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("accuracy.csv"))
    arguments = parser.parse_args()
    made: list[nn.Module] = []

    def make(config: NetworkConfig, plan: Plan) -> nn.Module:
        network = _make(arguments.network, config, plan)
        made.append(network)
        return network

    options = TrainOptions(
        fold=arguments.fold,
        seed=arguments.seed,
        threads=arguments.threads,
        max_minutes=arguments.max_minutes,
        max_steps=arguments.max_steps,
        config=arguments.config,
        resume=arguments.resume,
    )
    result = train(arguments.dataset, arguments.run, options, Terminal(), make)
    _append(arguments, made[0], result)


def _make(name: str, config: NetworkConfig, plan: Plan) -> nn.Module:
    if name == "monai-unet":
        return monai_unet(config, plan)
    return TokenSeg(config.model_copy(update={"tokens": name == "tokenseg"}), plan)


def _append(arguments: argparse.Namespace, network: nn.Module, result: TrainResult) -> None:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    minutes = arguments.max_minutes
    shared = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "dataset": arguments.dataset.name,
        "network": arguments.network,
        "fold": arguments.fold,
        "seed": arguments.seed,
        "steps": result.steps,
        "budget": f"{minutes:g} minutes" if minutes else f"{result.steps} steps",
        "threads": torch.get_num_threads(),
        "precision": "bf16" if bfloat16_helps(torch.device("cpu")) else "fp32",
        "parameters_m": f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.2f}",
        "train_s": f"{sum(float(row['seconds']) for row in read_journal(result.run / 'log.csv')):.0f}",
    }
    new = not arguments.csv.exists()
    with arguments.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for summary in result.evaluation.summaries:
            dice = summary.intervals["dice"]
            row = shared | {
                "label": summary.label.name,
                "n": summary.n,
                "n_missed": summary.n_missed,
                "dice": f"{dice.mean:.4f}",
                "dice_low": f"{dice.low:.4f}",
                "dice_high": f"{dice.high:.4f}",
                "hd95_mm": f"{summary.intervals['hd95_mm'].mean:.3f}",
                "nsd_1mm": f"{summary.intervals['nsd'].mean:.4f}",
            }
            writer.writerow(row)
            print(f"{arguments.network} {summary.label.name}: Dice {dice.mean:.4f} ({dice.low:.4f} to {dice.high:.4f})")


if __name__ == "__main__":
    sys.exit(main())
