"""The model folder: everything that segmentation needs, and nothing that runs.

    model/
      weights.safetensors   parameters and buffers
      model.json            schema version, plan, network settings, facts of the training, SHA-256 of the weights
      README.md             the model card
      LICENSE               of models that are published

Weights are never programs: no pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from tokenseg.config import NetworkConfig, Plan, Settings, parse_settings
from tokenseg.errors import ConfigError, FileError, ModelError
from tokenseg.files import temporary_beside, write_atomically
from tokenseg.model.network import TokenSeg
from tokenseg.model.passes import Forward
from tokenseg.planning.suitability import InputFacts, describe_inputs
from tokenseg.saved_model.builtin import find_model
from tokenseg.saved_model.card import Publication, publication_lines
from tokenseg.saved_model.run_folder import RunFolder

MakeNetwork: TypeAlias = Callable[[NetworkConfig, Plan], nn.Module]
"""Makes a network that returns a `TokenSegOutput`."""

SCHEMA_VERSION = 1
WEIGHTS_NAME, FACTS_NAME, CARD_NAME = "weights.safetensors", "model.json", "README.md"

# Of pickle protocols 2 to 5, and of the zip archive that torch.save puts one in.
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")


_LIMITS = "Limits: trained and checked on the cases named above; other scanners, sequences and anatomies are unknown."


class QualityFacts(Settings):
    """What a model's validation says of its probabilities, and its training of volumes."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """By what logits are divided to make probabilities true, see `inference/temperature.py`."""
    num_cases: Annotated[int, Field(ge=0)] = 0
    """Validation cases that it was fitted on; with 0 it was not."""
    calibration_error: tuple[float, float] | None = None
    """Expected calibration error of the validation cases without and with a temperature; None where not measured."""
    volumes_ml: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Smallest and largest volume of each label, of the training cases that have it."""


class ModelFacts(Settings):
    """Contents of `model.json`."""

    schema_version: int = SCHEMA_VERSION
    """Raised when a later TokenSeg changes the folder so that an earlier one cannot read it."""
    name: str
    """Name of the dataset or of the model."""
    plan: Plan
    """Grid, intensities, labels and windows."""
    network: NetworkConfig
    """Size and parts of the network."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Facts for the card: TokenSeg version, cases, fold, steps, validation figures."""
    inputs: InputFacts | None = None
    """What the training scans were like, so that others get a warning; None in models of earlier versions."""
    quality: QualityFacts | None = None
    """For quality signals; None in models of earlier versions."""
    publication: Publication | None = None
    """Figures, limits and licence of a model that is published."""
    weights_sha256: str = ""
    """Fingerprint of `weights.safetensors`; filled in when saving."""


@dataclass(frozen=True)
class Model:
    """A trained network, ready to segment.

    >>> from tokenseg import load_model
    >>> model = load_model("hippocampus")
    >>> model.facts.plan.source_channels, [label.name for label in model.facts.plan.labels]
    (('MRI',), ['Anterior', 'Posterior'])
    >>> model.facts.plan.spacing_mm
    (1.0, 1.0, 1.0)
    """

    network: nn.Module
    """In evaluation mode on `device`; returns a `TokenSegOutput`."""
    facts: ModelFacts
    """What it was trained for."""
    device: torch.device
    """Where it computes."""
    compiled: Forward | None = None
    """The same forward pass in another engine, which segmentation then takes; None stays with torch."""


def save_model(folder: Path, network: nn.Module, facts: ModelFacts, *, half: bool = False) -> None:
    """Write a model folder; an existing one is replaced as a whole.

    Args:
        folder: Where.
        network: With the weights.
        facts: What to say of it.
        half: Store matrices, kernels and the codebook with 16 bits a number, half the size. Vectors (biases, norms,
            statistics of the codes), which take little room and may be tiny, keep their precision, integers as well.

    Raises:
        FileError: The folder cannot be written; an existing one is then as it was.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    if half:
        tensors = {name: _halved(tensor) for name, tensor in tensors.items()}
    weights = save_tensors(tensors)
    facts = facts.model_copy(update={"weights_sha256": hashlib.sha256(weights).hexdigest()})
    fresh = temporary_beside(folder)
    try:
        fresh.mkdir(parents=True)
        write_atomically(fresh / WEIGHTS_NAME, weights)
        write_atomically(fresh / FACTS_NAME, json.dumps(facts.model_dump(mode="json"), indent=2).encode())
        write_atomically(fresh / CARD_NAME, _card(facts, network).encode())
        _exchange(fresh, folder)
    except (OSError, FileError) as error:
        # A FileError names the temporary folder; its cause is what the user needs.
        cause = error.__cause__ if isinstance(error, FileError) else error
        raise FileError(
            f"cannot write the model folder {folder}: {getattr(cause, 'strerror', None) or cause}; "
            "nothing was changed there"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load_model(path: Path | str, device: torch.device | str = "cpu", make_network: MakeNetwork = TokenSeg) -> Model:
    """Load a model folder, the model of a run folder, or a built-in model; in single precision, however stored.

    Nothing is downloaded, and no code is run from the folder. The random state is left as it is.

    >>> from tokenseg import load_model
    >>> model = load_model("hippocampus")
    >>> model.facts.name, model.network.training
    ('hippocampus', False)

    Args:
        path: The folder, or the name of a built-in model.
        device: Where the model is to compute; for one that torch does not have, the error is torch's.
        make_network: What the weights are for; a peer that was trained in the same pipeline brings its own.

    Raises:
        ModelError: The folder is missing, incomplete, corrupt, of a newer schema, or not made of safetensors + JSON.
    """
    folder = _find_folder(find_model(path))
    facts = _read_facts(folder / FACTS_NAME)
    tensors = _read_weights(folder / WEIGHTS_NAME, facts.weights_sha256)
    if _expected_shapes(facts, make_network) != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ModelError(
            f"{folder}: the weights do not fit the network in {FACTS_NAME}; copy the folder again, or train "
            "again if an older TokenSeg made it"
        )
    with torch.random.fork_rng(devices=[]):
        network = make_network(facts.network, facts.plan)
    network.load_state_dict(tensors)
    device = torch.device(device)
    return Model(network.to(device).eval(), facts, device)


def describe_model(model: Model) -> str:
    """The model's card: what it takes and gives, what it was trained on, its limits."""
    return _card(model.facts, model.network)


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return tensor
    halved = tensor.half()
    return halved if bool(halved.isfinite().all()) else tensor  # above 65504 there is no room


def _exchange(fresh: Path, folder: Path) -> None:
    """Let `fresh` take the name `folder`; if that fails, what had the name keeps it."""
    if not folder.exists():
        fresh.rename(folder)
        return
    old = folder.with_name(f".old{fresh.name}")
    folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _expected_shapes(facts: ModelFacts, make_network: MakeNetwork) -> dict[str, torch.Size] | None:
    """Shapes of the weights of the described network, found without its memory; None where there is no such network."""
    try:
        with torch.device("meta"):
            network = make_network(facts.network, facts.plan)
            return {name: tensor.shape for name, tensor in network.state_dict().items()}
    except (RuntimeError, ValueError, TypeError, ArithmeticError):
        return None


def _find_folder(path: Path) -> Path:
    if path.is_file():
        raise ModelError(
            f"{path} is a file; a model is a folder with {WEIGHTS_NAME} and {FACTS_NAME} "
            "(pickled checkpoints such as .pt and .pth are never loaded)"
        )
    folder = path if (path / FACTS_NAME).exists() or not RunFolder(path).model.is_dir() else RunFolder(path).model
    missing = [name for name in (FACTS_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    if len(missing) == 1:
        raise ModelError(f"model folder {folder} is incomplete: {missing[0]} is missing; copy the folder again")
    if missing and RunFolder(path).facts.is_file():
        raise ModelError(f"run {path} has no model yet; go on with it: tokenseg train DATASET {path} --resume")
    if missing:
        raise ModelError(
            f"{path} is not a model: {' and '.join(missing)} are missing; "
            "give a run folder of `tokenseg train`, or the model/ in it"
        )
    return folder


def _read_facts(path: Path) -> ModelFacts:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["schema_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{path} is damaged or not a TokenSeg model description; copy the model folder again"
        ) from error
    if version != SCHEMA_VERSION:
        raise ModelError(
            f"{path} has schema version {version}, this TokenSeg reads {SCHEMA_VERSION}; "
            "upgrade with: pip install -U tokenseg"
        )
    try:
        return parse_settings(ModelFacts, values, source=str(path))
    except ConfigError as error:
        raise ModelError(str(error)) from error


def _read_weights(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        if content[:2] in _PICKLE_STARTS:
            raise ModelError(f"{path} is a pickle, which TokenSeg never loads; copy the model folder again")
        raise ModelError(
            f"{path} does not match the SHA-256 in {FACTS_NAME}: damaged or exchanged; copy the model folder again"
        )
    try:
        return load_tensors(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"{path} is not valid safetensors; copy the model folder again") from error


def _card(facts: ModelFacts, network: nn.Module) -> str:
    plan = facts.plan
    count = sum(parameter.numel() for parameter in network.parameters())
    labels = ", ".join(f"{label.name} ({label.output_value})" for label in plan.labels)
    spacing = " x ".join(f"{value:g}" for value in plan.spacing_mm)
    lines = [
        f"# TokenSeg model: {facts.name}",
        "",
        "Research software: not a medical device, not for clinical use.",
        "",
        f"- Input: {', '.join(plan.source_channels)}",
        *([f"- Trained on: {describe_inputs(facts.inputs)}"] if facts.inputs else []),
        f"- Output: {labels}{' (overlapping regions)' if plan.regions else ''}",
        f"- Grid: {spacing} mm",
        f"- Network: {count / 1e6:.2f} M parameters",
        *(f"- {key.replace('_', ' ').capitalize()}: {value}" for key, value in facts.training.items()),
        "",
        *(publication_lines(facts.publication) if facts.publication else [_LIMITS, ""]),
    ]
    return "\n".join(lines)
