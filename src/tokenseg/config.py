"""Frozen, typed settings: the plan of a dataset, the network, the training; and one TOML file that holds all three.

A file is checked as a whole: every fault in it is reported at once, with its dotted key.
"""

from __future__ import annotations

import tomllib
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tokenseg.errors import ConfigError
from tokenseg.files import write_atomically

PresetName: TypeAlias = Literal["tiny", "small", "paper"]
DeviceName: TypeAlias = Literal["auto", "cpu", "cuda", "mps"]
EngineName: TypeAlias = Literal["auto", "torch", "openvino"]
Vox3: TypeAlias = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
Stride3: TypeAlias = tuple[Literal[1, 2], Literal[1, 2], Literal[1, 2]]
PositiveFloat: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Spacing3: TypeAlias = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
Fraction: TypeAlias = Annotated[float, Field(ge=0, le=1)]
PositiveInt: TypeAlias = Annotated[int, Field(ge=1)]
PerLevel: TypeAlias = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
Depth: TypeAlias = Annotated[int, Field(ge=1, le=100)]

NUM_LEVELS = 4


class Settings(BaseModel):
    """Base of all settings: immutable, no unknown keys, field docstrings are the documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


SettingsT = TypeVar("SettingsT", bound=Settings)


class Code(Settings):
    """One concept of a coding scheme, as DICOM names things."""

    value: Annotated[str, Field(pattern=r"^[^\\]{1,16}$")]
    """Code, such as 108369006."""
    meaning: Annotated[str, Field(pattern=r"^[^\\]{1,64}$")]
    """In words, such as Neoplasm."""
    scheme: Annotated[str, Field(pattern=r"^[^\\]{1,16}$")] = "SCT"
    """Coding scheme; SCT is SNOMED CT."""


class Coding(Settings):
    """What a label is, for DICOM segmentations."""

    category: Code
    """Broad kind: an anatomical structure, a morphologic abnormality, tissue..."""
    type: Code
    """The thing itself."""
    region: Code | None = None
    """Part of the body that it is in."""


class Label(Settings):
    """One thing to segment, in the user's own label values."""

    name: str
    """Name as in the user's dataset."""
    values: Annotated[tuple[int, ...], Field(min_length=1)]
    """Values in the reference masks that belong to it: one for an exclusive label, several for a region."""
    output_value: Annotated[int, Field(ge=1)]
    """Value written into masks. Regions are painted in the order of `Plan.labels`, later over earlier."""
    coding: Coding | None = None
    """What it is, for DICOM segmentations; None is written as tissue."""


class ChannelNormalisation(Settings):
    """How one channel becomes zero-mean and unit-variance."""

    kind: Literal["zscore", "window"]
    """`zscore`: by the volume's own mean and deviation (MR); `window`: clip, then dataset statistics (CT)."""
    low: float = 0.0
    """`window` only: clipped from below (0.5 percentile of the foreground of the dataset)."""
    high: float = 1.0
    """`window` only: clipped from above (99.5 percentile)."""
    mean: float = 0.0
    """`window` only: mean of the foreground of the dataset."""
    std: PositiveFloat = 1.0
    """`window` only: standard deviation of the foreground of the dataset."""


class Plan(Settings):
    """Everything that is fixed by the dataset and not by the network: grid, intensities, labels, windows."""

    channels: Annotated[tuple[str, ...], Field(min_length=1, max_length=8)]
    """Network input channels: a source channel name, or a difference of two such as `phase1 - phase0`."""
    source_channels: Annotated[tuple[str, ...], Field(min_length=1)]
    """Channels that an input must bring, in the order of its files or of its last axis."""
    joint_zscore: bool = False
    """Z-score by mean and deviation over all source channels together (DCE exams) before `channels`."""
    normalisation: tuple[ChannelNormalisation, ...]
    """One an entry of `channels`; ignored where `joint_zscore`."""
    labels: Annotated[tuple[Label, ...], Field(min_length=1)]
    """Foreground labels or regions, in the order of the network's outputs."""
    regions: bool = False
    """Labels may overlap (sigmoid outputs, no background output) instead of excluding each other."""
    spacing_mm: Spacing3
    """Voxel spacing that the network sees, along right, anterior, superior."""
    window_vox: Vox3
    """Training window, and the sliding window at inference."""
    whole_limit_vox: Vox3
    """A scan that fits in this at `spacing_mm` runs in one pass; a larger one by sliding windows."""
    coarse_factor: Vox3 | None = None
    """Experimental. Voxels averaged along each axis for a coarse view of a whole scan, which then decides where windows
    run; small lesions may be overlooked. Never planned: given in a --config file, every fourth training step takes
    coarse views. None runs all windows."""
    strides: tuple[Stride3, Stride3, Stride3, Stride3]
    """Down-sampling factors of the four levels; an axis that is coarse already is not pooled."""
    grid: Vox3
    """Cells a level: 4 along the axis with the smallest extent in mm, 5 along the others."""
    batch_size: Annotated[int, Field(ge=1)]
    """Windows a training step."""
    steps: Annotated[int, Field(ge=1)]
    """Training steps when neither --max-steps nor --max-minutes is given."""
    reasons: dict[str, str] = Field(default_factory=dict)
    """For each planned value the rule that gave it, in words."""

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        if len(self.normalisation) != len(self.channels):
            raise ValueError(
                f"normalisation has {len(self.normalisation)} entries for {len(self.channels)} channels; give one each"
            )
        for name in self.needed_channels:
            if name not in self.source_channels:
                raise ValueError(f"channels names {name!r}, source_channels has {', '.join(self.source_channels)}")
        for what, values in (
            ("an output_value", [label.output_value for label in self.labels]),
            ("a name", [label.name for label in self.labels]),
            ("a value", [] if self.regions else [value for label in self.labels for value in label.values]),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"labels share {what}: {values}; each needs its own")
        for label in self.labels:
            if 0 in label.values or label.output_value not in label.values:
                raise ValueError(
                    f"label {label.name!r} has values {label.values} and output_value {label.output_value}: "
                    "0 is background, and the output_value must be one of the values"
                )
        return self

    @property
    def needed_channels(self) -> tuple[str, ...]:
        """Source channels that `channels` mentions, each once, in order of first use."""
        names = (part.strip() for channel in self.channels for part in channel.split(" - "))
        return tuple(dict.fromkeys(names))

    @property
    def total_strides(self) -> tuple[tuple[int, int, int], ...]:
        """Down-sampling of each level against full resolution."""
        steps = accumulate(
            self.strides, lambda total, step: (total[0] * step[0], total[1] * step[1], total[2] * step[2])
        )
        return tuple(steps)

    @property
    def num_outputs(self) -> int:
        """Output channels of the network: regions, or labels and background."""
        return len(self.labels) + (0 if self.regions else 1)


class NetworkConfig(Settings):
    """Size and parts of TokenSeg; the paper's numbers where it gives them."""

    widths: PerLevel
    """Feature channels of the four levels (1/2, 1/4, 1/8, 1/16)."""
    blocks: tuple[Depth, Depth, Depth, Depth] = (1, 2, 2, 2)
    """Residual blocks of each level of the encoder."""
    stochastic_depth: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Probability with which a residual block is skipped for a volume in training."""
    tokens: bool = True
    """False leaves the token path out: the plain encoder-decoder, for ablation."""
    token_width: Annotated[int, Field(ge=8, multiple_of=4)] = 128
    """F, width of a token."""
    num_kept: Annotated[int, Field(ge=1)] = 100
    """K, tokens kept of the 400 candidates."""
    quantizer: Literal["vq", "fsq", "none"] = "vq"
    """Vector quantisation with a learned codebook, finite scalar quantisation, or neither."""
    codebook_size: Annotated[int, Field(ge=2)] = 512
    """E, entries of the codebook (`vq`; `fsq` always has 8^4 = 4096)."""
    score: Literal["learned", "sum"] = "learned"
    """How the three terms of the importance score join: weights learned against the surface, or a plain sum."""
    mixer_layers: Annotated[int, Field(ge=0, le=100)] = 2
    """Transformer layers over the kept tokens."""
    refine_fraction: Fraction = 0.0625
    """Share of the 2 x 2 x 2 blocks, the most uncertain, whose logits are refined at full resolution; 0 leaves the
    refinement out."""


PRESETS: dict[PresetName, NetworkConfig] = {
    "tiny": NetworkConfig(
        widths=(8, 12, 16, 24), blocks=(1, 1, 1, 1), token_width=32, codebook_size=64, mixer_layers=1
    ),
    "small": NetworkConfig(widths=(32, 64, 128, 160)),
    "paper": NetworkConfig(widths=(64, 128, 256, 384), token_width=256, codebook_size=4096, mixer_layers=4),
}


class TrainConfig(Settings):
    """How the weights are found."""

    learning_rate: PositiveFloat = 2e-3
    """Peak of the schedule (AdamW)."""
    token_learning_rate_factor: PositiveFloat = 0.2
    """The token path learns at this share of the rate, so that it does not disturb the encoder early on."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    """AdamW weight decay, on weights with more than one axis."""
    warmup_fraction: Fraction = 0.05
    """Share of the steps over which the rate rises linearly; a cosine falls to zero over the rest."""
    clip_norm: PositiveFloat = 1.0
    """Largest norm of the gradient."""
    deep_supervision_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the mean loss at 1/4 and 1/8 beside the full-resolution loss."""
    commitment_weight: Annotated[float, Field(ge=0)] = 0.25
    """Weight of the quantizer's commitment loss."""
    score_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the importance score's cross-entropy against the cells that the surface crosses."""
    foreground_fraction: Fraction = 0.5
    """Share of the windows of a batch that are centred on a foreground voxel."""
    augment: bool = True
    """False trains on the windows as they are: to learn a few cases by heart, where detail must not be blurred."""


class RunConfig(Settings):
    """What a run folder's `config.toml` holds, complete."""

    plan: Plan
    network: NetworkConfig
    train: TrainConfig = TrainConfig()


def read_overrides(path: Path) -> dict[str, dict[str, Any]]:
    """Read a user's TOML file: any subset of the tables `plan`, `network` and `train`.

    Raises:
        ConfigError: The file is missing or not TOML, or has another table or a bare key.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from error
    allowed = set(RunConfig.model_fields)
    wrong = sorted(key for key, value in tables.items() if key not in allowed or not isinstance(value, dict))
    if wrong:
        raise ConfigError(
            f"config file {path}: unknown top-level keys {', '.join(wrong)}; "
            "allowed are the tables [plan], [network], [train]"
        )
    return tables


def build_run_config(plan: Plan, network: NetworkConfig, overrides: dict[str, dict[str, Any]]) -> RunConfig:
    """Join planned and preset values with a user's overrides.

    Raises:
        ConfigError: Overrides hold unknown keys or values out of range; the message lists all of them.
    """
    defaults = {"plan": plan.model_dump(), "network": network.model_dump(), "train": TrainConfig().model_dump()}
    merged = {table: values | overrides.get(table, {}) for table, values in defaults.items()}
    return parse_settings(RunConfig, merged, source="config file")


def parse_settings(kind: type[SettingsT], values: object, *, source: str) -> SettingsT:
    """Validate plain values, reporting all faults in one `ConfigError` with dotted keys."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        faults = [
            f"  {'.'.join(str(part) for part in fault['loc']) or '(whole)'}: {fault['msg']}" for fault in error.errors()
        ]
        raise ConfigError(f"{source} has {len(faults)} fault(s):\n" + "\n".join(faults)) from error


def write_run_config(path: Path, config: RunConfig) -> None:
    """Write the whole configuration as TOML that a person can edit and pass back with `--config`."""
    header = "# TokenSeg run configuration. Edit it and pass it back: tokenseg train DATASET RUN --config THIS_FILE\n\n"
    write_atomically(path, (header + tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))).encode())


def read_run_config(path: Path) -> RunConfig:
    """Read a complete `config.toml`, as written by `write_run_config`."""
    return parse_settings(RunConfig, read_overrides(path), source=f"config file {path}")
