"""The command `tokenseg train`: a dataset folder in, a run folder out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tokenseg.commands.preflight import needs_extra, quieten_training_libraries, refuse_file
from tokenseg.commands.terminal import Terminal, print_evaluation
from tokenseg.errors import TokenSegError
from tokenseg.options import TrainOptions


@dataclass(frozen=True)
class Train:
    """Train on a dataset folder (Medical Segmentation Decathlon, nnU-Net v2 or MAMA-MIA layout)."""

    dataset: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATASET")]
    """Dataset folder."""
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder to make; the model will be in RUN/model."""
    options: Annotated[TrainOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TrainOptions)

    def execute(self) -> int:
        """Train, then print the validation table."""
        needs_extra("train", "monai", "lightning_fabric")
        refuse_file(self.run)
        quieten_training_libraries()
        from tokenseg.processes import process_number
        from tokenseg.saved_model.run_folder import RunFolder
        from tokenseg.training.train import train

        try:
            with Terminal() as terminal:
                result = train(self.dataset, self.run, self.options, terminal)
        except TokenSegError as error:
            if number := process_number():
                raise type(error)(f"process {number}: {error}") from error
            raise
        if process_number():
            return 0
        folder = RunFolder(self.run)
        print_evaluation(result.evaluation)
        print(f"model: {folder.model}  ({result.steps} steps)")
        print(f"report: {folder.report}")
        print(f"next: tokenseg segment SCAN.nii.gz MASK.nii.gz --model {self.run}")
        return 0
