"""The command `tokenseg check`: faults of a dataset and its mended copy, or the grids of files compared."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tokenseg.commands.preflight import check_outputs, needs_extra, refuse_used_folder
from tokenseg.commands.terminal import Terminal, say
from tokenseg.errors import ConfigError

if TYPE_CHECKING:
    from tokenseg.checking.findings import Finding
    from tokenseg.datasets.cases import Dataset


@dataclass(frozen=True)
class Check:
    """Look for faults in a dataset, one line each, or compare the grids of files with that of the first."""

    paths: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="DATASET_OR_FILES")]
    """Dataset folder, or two or more image files."""
    fix: Path | None = None
    """Write a mended copy of the dataset here; the original is not touched."""
    json: Path | None = None
    """Write the findings as JSON here."""
    pictures: Path | None = None
    """Write a picture of each case with an error or a warning into this folder."""

    def execute(self) -> int:
        """Check, print, and mend; 1 if training would refuse the dataset as it is."""
        from tokenseg.checking.findings import check_dataset, check_files
        from tokenseg.datasets.layouts import open_dataset

        check_outputs(json=self.json)
        is_dataset = len(self.paths) == 1 and self.paths[0].is_dir()
        if not is_dataset and (self.fix or self.pictures):
            raise ConfigError("--fix and --pictures are for one dataset folder; leave them out for files")
        if not is_dataset and len(self.paths) < 2:
            raise ConfigError("give a dataset folder, or two or more files to compare with the first of them")
        if self.pictures is not None:
            needs_extra("plot", "matplotlib")
            refuse_used_folder(self.pictures)
        with Terminal() as terminal:
            if not is_dataset:
                findings = check_files(self.paths)
                self._print(findings, len(self.paths), "files")
            else:
                dataset = open_dataset(self.paths[0])
                if self.fix is not None:
                    from tokenseg.checking.mending import check_target

                    check_target(dataset, self.fix)
                findings = check_dataset(dataset, terminal)
                self._print(findings, len(dataset.cases), "cases")
                self._use(dataset, findings, terminal)
        return 1 if any(finding.severity == "error" for finding in findings) else 0

    def _use(self, dataset: Dataset, findings: list[Finding], terminal: Terminal) -> None:
        if self.pictures is not None:
            from tokenseg.checking.pictures import draw_cases

            draw_cases(dataset, findings, self.pictures, terminal)
        if self.fix is None:
            return
        if not any(finding.fixable for finding in findings):
            say(f"nothing that --fix mends; {self.fix} is not made")
            return
        from tokenseg.checking.mending import mend_dataset

        changed = mend_dataset(dataset, findings, self.fix, terminal)
        say(f"{self.fix}: a copy, {len(changed)} file(s) of it mended")

    def _print(self, findings: list[Finding], count: int, what: str) -> None:
        from tokenseg.files import write_atomically

        for finding in findings:
            mend = f". {finding.mend[0].upper()}{finding.mend[1:]}" if finding.mend else ""
            print(f"{finding.severity}: {finding.case_id}: {finding.text}{mend}")
        counts = [sum(finding.severity == kind for finding in findings) for kind in ("error", "warning", "note")]
        print(f"{count} {what}: {counts[0]} error(s), {counts[1]} warning(s), {counts[2]} note(s)")
        if self.json is not None:
            write_atomically(self.json, json.dumps([asdict(finding) for finding in findings], indent=1).encode())
