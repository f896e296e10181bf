from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phantoms import change_json
from plans import make_plan
from tokenseg.config import PRESETS, NetworkConfig
from tokenseg.errors import FileError, ModelError
from tokenseg.planning.suitability import InputFacts
from tokenseg.saved_model.checkpoint import Model, describe_model, load_model, save_model
from toy_models import save_untrained, untrained


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def logits(model) -> torch.Tensor:
    image = torch.randn(1, 1, 33, 32, 35, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return model.network(image).logits


@pytest.mark.parametrize("quantizer", ["vq", "fsq", "none"])
@pytest.mark.parametrize("tokens", [True, False])
def test_round_trip_gives_the_same_logits_facts_and_mode(tmp_path, quantizer, tokens):
    config = PRESETS["tiny"].model_copy(update={"quantizer": quantizer, "tokens": tokens})
    model = untrained(make_plan(labels=2), config=NetworkConfig.model_validate(config.model_dump()))
    save_model(tmp_path / "model", model.network, model.facts)
    loaded = load_model(tmp_path / "model")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert loaded.facts.model_dump(exclude={"weights_sha256"}) == model.facts.model_dump(exclude={"weights_sha256"})
    assert not loaded.network.training
    assert loaded.device == torch.device("cpu")


def test_the_folder_holds_weights_facts_and_card_and_no_program(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.json", "weights.safetensors"]
    weights = (folder / "weights.safetensors").read_bytes()
    facts = json.loads((folder / "model.json").read_text())
    assert facts["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert facts["schema_version"] == 1
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    assert "decoder" in " ".join(header)


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_half_precision_is_loaded_exactly_into_single(tmp_path, quantizer):
    config = PRESETS["tiny"].model_copy(update={"quantizer": quantizer})
    model = untrained(make_plan(labels=2), config=NetworkConfig.model_validate(config.model_dump()))
    full = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    save_model(tmp_path / "full", model.network, model.facts)
    save_model(tmp_path / "half", model.network, model.facts, half=True)
    stored = load_file(tmp_path / "half" / "weights.safetensors")
    loaded = load_model(tmp_path / "half").network.state_dict()
    assert loaded.keys() == stored.keys() == full.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == full[name].dtype
        halved = full[name].is_floating_point() and full[name].ndim > 1
        assert stored[name].dtype == (torch.float16 if halved else full[name].dtype)
        assert torch.equal(tensor, full[name].half().float() if halved else full[name])
    sizes = [(tmp_path / name / "weights.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    # Saving did not touch the network, and what was stored once is stored again without loss.
    assert all(torch.equal(tensor, full[name]) for name, tensor in model.network.state_dict().items())
    again = load_model(tmp_path / "half")
    save_model(tmp_path / "again", again.network, again.facts, half=True)
    assert (tmp_path / "again" / "weights.safetensors").read_bytes() == (
        tmp_path / "half" / "weights.safetensors"
    ).read_bytes()


def test_what_is_too_large_for_half_precision_stays(tmp_path):
    model = untrained()
    name, weights = next((name, each) for name, each in model.network.named_parameters() if each.ndim > 1)
    weights.data[(0,) * weights.ndim] = 1e6
    save_model(tmp_path / "model", model.network, model.facts, half=True)
    assert torch.equal(load_model(tmp_path / "model").network.state_dict()[name], weights.data)


def test_damaged_half_precision_weights(tmp_path):
    model = untrained()
    save_model(tmp_path / "model", model.network, model.facts, half=True)
    path = tmp_path / "model" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"weights.safetensors does not match the SHA-256 in model.json"):
        load_model(tmp_path / "model")


def test_the_card_tells_what_the_model_was_trained_on():
    model = untrained()
    inputs = InputFacts(
        content="crops", extent_mm=((3, 4), (5, 5), (6, 7)), spacing_mm=((1, 1), (1, 1), (2, 2.5)), anisotropy=(2, 2.5)
    )
    told = Model(model.network, model.facts.model_copy(update={"inputs": inputs}), model.device)
    line = "- Trained on: crops, 3-4 x 5 x 6-7 mm (right, anterior, superior), voxels 1 x 1 x 2-2.5 mm"
    assert line in describe_model(told).splitlines()
    assert "Trained on" not in describe_model(model)


def test_the_run_folder_stands_for_its_model(saved):
    torch.testing.assert_close(logits(load_model(saved.parent)), logits(load_model(str(saved))), rtol=0, atol=0)


def test_loading_leaves_the_random_numbers_alone(saved):
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    load_model(saved)
    assert torch.equal(torch.rand(4), expected)


def test_an_existing_folder_is_replaced_as_a_whole(folder):
    (folder / "left over").write_text("from an earlier version")
    other = untrained(seed=1)
    save_model(folder, other.network, other.facts)
    torch.testing.assert_close(logits(load_model(folder)), logits(other), rtol=0, atol=0)
    assert not (folder / "left over").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_failed_save_keeps_the_model_that_was_there(folder, monkeypatch, failing):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda self, to: full() if self.name.startswith(".partial") else rename(self, to)
        )
    other = untrained(seed=1)
    with pytest.raises(FileError, match=f"cannot write the model folder {folder}: No space left on device; nothing"):
        save_model(folder, other.network, other.facts)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_model_cannot_be_saved_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    model = untrained()
    with pytest.raises(FileError, match=r"cannot write the model folder .*file/model: Not a directory"):
        save_model(tmp_path / "file" / "model", model.network, model.facts)


def test_the_card_says_what_goes_in_and_out_and_that_it_is_no_device(saved):
    model = load_model(saved)
    card = (saved / "README.md").read_text()
    assert card == describe_model(model)
    assert "not a medical device" in card
    assert "not for clinical use" in card
    assert "Input: c0" in card
    assert "Output: l0 (1)" in card
    assert "Grid: 1 x 1 x 1 mm" in card
    count = sum(parameter.numel() for parameter in model.network.parameters())
    assert f"{count / 1e6:.2f} M parameters" in card
    assert "Training cases: 4" in card


def test_the_card_marks_regions(tmp_path):
    card = describe_model(untrained(make_plan(channels=2, labels=3, regions=True)))
    assert "Input: c0, c1" in card
    assert "Output: l0 (1), l1 (2), l2 (3) (overlapping regions)" in card


def test_missing_path(tmp_path):
    with pytest.raises(ModelError, match=r"model .*nowhere does not exist; check the path"):
        load_model(tmp_path / "nowhere")


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"is not a model: model.json and weights.safetensors are missing; give a run"):
        load_model(tmp_path)


def test_a_run_without_a_model_yet(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has no model yet; go on with it: tokenseg train DATASET .* --resume"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
def test_incomplete_folder(folder, name):
    (folder / name).unlink()
    for path in (folder, folder.parent):
        with pytest.raises(ModelError, match=rf"model folder .*model is incomplete: {name} is missing; copy"):
            load_model(path)


@pytest.mark.parametrize("name", ["checkpoint.pth", "model.pt", "weights.safetensors"])
def test_a_file_is_not_a_model(tmp_path, name):
    torch.save({"weight": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(ModelError, match=rf"{name} is a file; a model is a folder .*\.pth are never loaded"):
        load_model(tmp_path / name)


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "zip"])
def test_a_pickle_is_never_loaded_whatever_its_name(folder, tmp_path, protocol):
    weights = folder / "weights.safetensors"
    if protocol == "zip":
        torch.save(Bomb(tmp_path / "exploded"), weights)
    else:
        weights.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), protocol=protocol))
    with pytest.raises(ModelError, match=r"weights.safetensors is a pickle, which TokenSeg never loads"):
        load_model(folder)
    # Not even where the description vouches for it.
    change_json(folder / "model.json", weights_sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
    with pytest.raises(ModelError, match="is not valid safetensors; copy the model folder again"):
        load_model(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("place", ["header", "middle", "end", "cut", "empty"])
def test_damaged_weights(folder, place):
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    if place in ("cut", "empty"):
        content = content[: len(content) // 2 if place == "cut" else 0]
    else:
        content[{"header": 20, "middle": len(content) // 2, "end": -1}[place]] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ModelError, match=r"weights.safetensors does not match the SHA-256 in model.json: damaged or exchanged; copy"
    ):
        load_model(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"schema_version"', b"{}", b"\xff\xfe", b"[" * 100_000], ids=range(8)
)
def test_damaged_description(folder, content):
    (folder / "model.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"model.json is damaged or not a TokenSeg model description; copy"):
        load_model(folder)


def test_newer_schema(folder):
    change_json(folder / "model.json", schema_version=2, something_new=True)
    with pytest.raises(ModelError, match=r"schema version 2, this TokenSeg reads 1; upgrade with: pip install -U"):
        load_model(folder)


def test_unknown_and_missing_keys_are_all_named(folder):
    change_json(folder / "model.json", extra=1, plan=None, network={"widths": 3})
    with pytest.raises(ModelError, match=r"(?s)model.json has 3 fault.*plan: .*network.widths: .*extra: "):
        load_model(folder)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "changes",
    [
        {"plan": make_plan(channels=2).model_dump(mode="json")},
        {"plan": make_plan(labels=2).model_dump(mode="json")},
        {"plan": make_plan(grid=(5, 5, 4)).model_dump(mode="json")} | {"network": PRESETS["small"].model_dump()},
        {"network": PRESETS["tiny"].model_dump() | {"tokens": False}},
        {"network": PRESETS["tiny"].model_dump() | {"widths": [0, 0, 0, 0]}},
        {"network": PRESETS["tiny"].model_dump() | {"widths": [-8, 12, 16, 24]}},
        {"network": PRESETS["tiny"].model_dump() | {"widths": [10**10] * 4}},
        {"network": PRESETS["tiny"].model_dump() | {"codebook_size": 10**12}},
    ],
    ids=["channels", "labels", "preset", "no tokens", "zero width", "negative width", "huge width", "huge codebook"],
)
def test_weights_of_another_network(folder, changes):
    change_json(folder / "model.json", **changes)
    with pytest.raises(
        ModelError, match=r"weights do not fit the network in model.json; copy|model.json has \d+ fault"
    ):
        load_model(folder)


def test_weights_that_cannot_be_read(folder, monkeypatch):
    def broken(_: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(ModelError, match=r"weights.safetensors cannot be read: Input/output error"):
        load_model(folder)


def test_weights_exchanged_between_two_models(folder, tmp_path):
    other = save_untrained(tmp_path / "other", make_plan(), seed=1)
    shutil.copy(other / "weights.safetensors", folder / "weights.safetensors")
    with pytest.raises(ModelError, match="damaged or exchanged"):
        load_model(folder)
