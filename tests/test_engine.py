"""OpenVINO computes what torch computes, once converted, kept in a cache, and without a word to anybody."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn

import tokenseg.device
from phantoms import phantom, write_nifti
from plans import THICK_SLICES, make_plan
from tokenseg.cli import main
from tokenseg.config import PRESETS, Plan
from tokenseg.errors import ConfigError, ModelError
from tokenseg.imaging.volume import read_mask
from tokenseg.inference import engine
from tokenseg.inference.engine import CACHED_MODELS, choose_engine, compile_openvino
from tokenseg.inference.windows import forward_of
from tokenseg.model.network import TokenSeg
from tokenseg.model.passes import parts_of
from tokenseg.saved_model.checkpoint import Model, ModelFacts, load_model, save_model
from toy_models import labels_of, nearest_level, save_untrained, toy_model

if not engine.is_installed():
    # Not by importing it: that would report to its makers (see the tests of silence below).
    pytest.skip("needs the extra openvino", allow_module_level=True)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Sizes are tensors while torch traces, and no tensor is an `int` to the type checker.
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tokenseg.device, engine):
        monkeypatch.setattr(module, "bfloat16_helps", lambda _: False)


def active_model(plan: Plan, seed: int = 0, **changes: object) -> Model:
    """Untrained, but tokens and refinement change the result, as after training."""
    config = PRESETS["tiny"].model_copy(update=changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TokenSeg(config, plan).eval()
        for layer in network.tokenizer.reproject.project:
            nn.init.normal_(layer.weight, std=0.3)
        nn.init.normal_(network.refiner.change.weight, std=0.3)
    return Model(network, ModelFacts(name="phantom", plan=plan, network=config), CPU)


def saved(folder: Path, seed: int = 0) -> Model:
    return load_model(save_untrained(folder, make_plan(), seed))


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "tokenseg" / "openvino").glob("*"))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))


# ---- parity


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize(
    ("plan", "changes"),
    [
        pytest.param(make_plan(2, 2), {}, id="vq"),
        pytest.param(make_plan(1, 3, regions=True), {"quantizer": "fsq", "score": "sum"}, id="fsq, sum, regions"),
        pytest.param(make_plan(strides=THICK_SLICES), {"quantizer": "none"}, id="none, thick slices"),
    ],
)
def test_fp32_gives_the_same_logits_at_any_size(plan, changes):
    model = active_model(plan, **changes)
    chosen = choose_engine([model], "openvino")
    assert chosen[1:] == ("openvino", "fp32", "")
    forward = forward_of(chosen.models[0])
    # Odd; smaller than the network's least; the window, which has a compilation of its own.
    for size in ((41, 29, 35), (9, 50, 20), plan.window_vox):
        images = noise(len(plan.channels), *size)
        with torch.inference_mode():
            expected = model.network(images).logits
            few_tokens = model.network(images, num_kept=1).logits
        np.testing.assert_allclose(forward(images).logits, expected, rtol=0, atol=1e-3 * float(expected.abs().amax()))
        assert (few_tokens - expected).abs().amax() > 0.01, "the tokens must matter for this test to mean anything"


def test_bf16_gives_the_dice_of_fp32(monkeypatch):
    """A network that learned spheres: its masks in bf16 score within 0.1 points of those of torch in fp32."""
    monkeypatch.setattr(engine, "bfloat16_helps", lambda _: True)
    model = trained_on_spheres()
    chosen = choose_engine([model], "openvino")
    assert chosen.precision == "bf16"
    scores = {"fp32": [], "bf16": []}
    for seed in range(100, 104):
        image, mask = sphere(seed)
        with torch.inference_mode():
            expected = model.network(image[None]).logits
        for precision, logits in (("fp32", expected), ("bf16", forward_of(chosen.models[0])(image[None]).logits)):
            predicted = logits[0].argmax(0) == 1
            scores[precision].append(float(2 * (predicted & (mask == 1)).sum() / (predicted.sum() + mask.sum())))
        assert not torch.equal(expected, forward_of(chosen.models[0])(image[None]).logits), "bf16 must have been used"
    assert np.mean(scores["fp32"]) > 0.95
    assert np.mean(scores["bf16"]) == pytest.approx(np.mean(scores["fp32"]), abs=0.001)


def sphere(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    image, mask = phantom(seed, shape=(48, 48, 48))
    image = (image - image.mean()) / image.std()
    return torch.from_numpy(image).float(), torch.from_numpy(mask.astype(np.int64))


def trained_on_spheres() -> Model:
    model = active_model(make_plan(window_vox=(48, 48, 48)))
    network = model.network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for step in range(40):
        images, masks = (torch.stack(parts) for parts in zip(sphere(2 * step), sphere(2 * step + 1), strict=True))
        loss = nn.functional.cross_entropy(network(images).logits, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    return model


def test_the_same_bits_again_whatever_came_before(tmp_path):
    model = active_model(make_plan())
    save_model(tmp_path / "model", model.network, model.facts)
    model = load_model(tmp_path / "model")
    images = [noise(1, *size) for size in ((32, 32, 32), (20, 40, 32), (40, 40, 40))]
    one_by_one = [forward_of(choose_engine([model], "openvino", threads=1).models[0])(image).logits for image in images]
    forward = forward_of(choose_engine([model], "openvino", threads=1).models[0])
    for place in (2, 1, 0, 0, 1):
        assert torch.equal(forward(images[place]).logits, one_by_one[place])


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("changes", [{}, {"quantizer": "fsq", "score": "sum"}, {"quantizer": "none"}])
def test_tokens_are_those_of_torch(changes):
    model = active_model(make_plan(), **changes)
    forward = forward_of(choose_engine([model], "openvino").models[0])
    for size in ((41, 29, 35), (32, 32, 32)):
        images = torch.cat([noise(1, *size), noise(1, *size).flip(2)])
        tokens = forward(images).tokens
        with torch.inference_mode():
            record = model.network(images).tokens
        for name in ("boundary", "semantic", "diversity", "score"):
            np.testing.assert_allclose(getattr(tokens, name), getattr(record.importance, name), atol=2e-3)
        # Two of nearly the same score may change places.
        assert (tokens.kept == record.kept).float().mean() > 0.98
        assert (tokens.codes == record.codes).float().mean() > 0.98
        assert tokens.kept.sum(dim=1).tolist() == [model.facts.network.num_kept] * 2


@pytest.mark.usefixtures("in_fp32")
def test_a_result_outlives_the_next_pass():
    # One output and blocks of one voxel: nothing has to be moved, so nothing would be copied by itself.
    model = active_model(make_plan(1, 1, regions=True, strides=((1, 1, 1), *((2, 2, 2),) * 3)))
    forward = forward_of(choose_engine([model], "openvino").models[0])
    images = noise(1, 32, 32, 32)
    result = forward(images).logits
    before = result.clone()
    assert not torch.equal(forward(-images).logits, before)
    assert torch.equal(result, before)


@pytest.mark.usefixtures("in_fp32")
def test_any_network_compiles_for_every_size_it_meets():
    plain = nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1), nn.Flatten(2), nn.Softmax(dim=2), nn.Unflatten(2, (-1, 10, 12))
    )
    images = noise(2, 8, 10, 12)
    forward = compile_openvino(plain.eval(), 2, threads=1, precision="fp32")
    with torch.inference_mode():
        for batch in (images, noise(2, 9, 10, 12), torch.cat([images, -images])):
            np.testing.assert_allclose(forward(batch).logits, plain(batch), rtol=1e-3, atol=1e-6)
        # A peer in the pipeline: known by its output alone, so nothing is assumed of its sizes.
        model = toy_model(nearest_level(2), make_plan())
        chosen = choose_engine([model], "openvino").models[0]
        for size in ((7, 8, 9), (12, 8, 9)):
            found = forward_of(chosen)(noise(1, *size))
            np.testing.assert_allclose(found.logits, model.network(noise(1, *size)).logits)
            assert found.tokens is None


def test_few_sizes_stay_compiled(monkeypatch):
    compiled = []
    real = engine._convert
    monkeypatch.setattr(engine, "_convert", lambda *given: compiled.append(given[2]) or real(*given))
    forward = compile_openvino(nn.Identity(), 1, threads=1, precision="fp32")
    for length in (4, 5, 6, 7, 4, 8, 4, 5):
        forward(noise(1, length, 4, 4))
    assert [size[0] for size in compiled] == [4, 5, 6, 7, 8, 5]


# ---- which engine


def test_auto_takes_openvino_on_a_cpu_and_torch_elsewhere(monkeypatch):
    monkeypatch.setattr(engine, "_forward_of", lambda *_: torch.sin)
    model = active_model(make_plan())
    on_cpu = choose_engine([model], "auto")
    assert on_cpu.engine == "openvino"
    assert forward_of(on_cpu.models[0]) is torch.sin
    assert choose_engine([model], "torch") == ([model], "torch", on_cpu.precision, "")
    on_mps = replace(model, device=torch.device("mps"))
    assert choose_engine([on_mps], "auto") == ([on_mps], "torch", "fp32", "")
    with pytest.raises(ConfigError, match="--engine openvino computes on the CPU, not on mps; add --device cpu"):
        choose_engine([on_mps], "openvino")


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr(engine, "find_spec", lambda _: None)
    model = active_model(make_plan())
    chosen = choose_engine([model], "auto")
    assert chosen.models == [model]
    assert chosen.engine == "torch"
    with pytest.raises(ConfigError, match=r"needs the extra 'openvino': pip install 'tokenseg\[openvino\]'"):
        choose_engine([model], "openvino")


def test_what_cannot_be_converted_stays_with_torch_and_says_so(monkeypatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("no rule for aten::strange\nand a page of this")

    monkeypatch.setattr(engine, "_convert", refuse)
    model = active_model(make_plan())
    chosen = choose_engine([model], "auto")
    assert chosen.models == [model]
    assert chosen.problem == "OpenVINO cannot take this model (no rule for aten::strange)"
    with pytest.raises(ModelError, match=r"cannot take this model \(no rule for aten::strange\); use --engine torch"):
        choose_engine([model], "openvino")


def test_a_conversion_with_another_result_is_refused(monkeypatch):
    """Such as one in which a size became a constant."""
    other, real = active_model(make_plan(), seed=1), engine._convert
    monkeypatch.setattr(engine, "_convert", lambda _, *given: real(parts_of(other.network), *given))
    with pytest.raises(ModelError, match=r"\(its result differs from torch's\)"):
        choose_engine([active_model(make_plan())], "openvino")


# ---- cache


def count_conversions(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    conversions, real = [], engine._convert
    monkeypatch.setattr(engine, "_convert", lambda *given: conversions.append(given) or real(*given))
    return conversions


def test_a_saved_model_is_converted_once(tmp_path, monkeypatch):
    conversions = count_conversions(monkeypatch)
    model = saved(tmp_path / "model")
    images = noise(1, 20, 22, 24)
    first = forward_of(choose_engine([model], "openvino").models[0])(images)
    again = forward_of(choose_engine([load_model(tmp_path / "model")], "openvino").models[0])(images)
    assert torch.equal(first.logits, again.logits)
    assert len(conversions) == 1
    # Damaged: converted again, and good again.
    (stored,) = cached(tmp_path)
    good = stored.read_bytes()
    monkeypatch.setattr(engine, "_convert_any_size", lambda model: conversions.append(model) or good)
    for bad in (good[:-1], good[:100] + b"?" + good[101:], b""):
        stored.write_bytes(bad)
        assert engine._stored_conversion(model) == good
        assert stored.read_bytes() == good
    assert len(conversions) == 4


def test_other_weights_settings_and_sources_are_other_entries(tmp_path, monkeypatch):
    model = saved(tmp_path / "model")
    place = engine._cache_path(model)
    others = [
        {"weights_sha256": "0" * 64},
        {"network": model.facts.network.model_copy(update={"num_kept": 50})},
        {"plan": model.facts.plan.model_copy(update={"spacing_mm": (1.0, 1.0, 2.0)})},
    ]
    places = {engine._cache_path(replace(model, facts=model.facts.model_copy(update=change))) for change in others}
    monkeypatch.setattr(engine, "version", lambda _: "1.2.3")
    places |= {place, engine._cache_path(model)}
    assert len(places) == 5


def test_the_cache_keeps_the_newest_few(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_convert_any_size", lambda _: b"32 bytes that are no SHA-256 of it, and more")
    models = [active_model(make_plan()) for _ in range(CACHED_MODELS + 2)]
    models = [replace(m, facts=m.facts.model_copy(update={"weights_sha256": f"{n}"})) for n, m in enumerate(models)]
    for number, model in enumerate(models):
        engine._stored_conversion(model)
        os.utime(engine._cache_path(model), (number, number))
    (tmp_path / "cache" / "tokenseg" / "openvino" / ".partial-1-left.ir").touch()
    engine._stored_conversion(models[0])
    assert cached(tmp_path) == sorted(engine._cache_path(models[number]) for number in (0, 3, 4, 5, 6))


def test_without_a_cache_folder_it_works(tmp_path, monkeypatch):
    model = saved(tmp_path / "model")
    (tmp_path / "cache").touch()  # a file where the folder should be cannot be written, not even by root
    monkeypatch.setattr(engine, "_convert_any_size", lambda _: b"converted")
    assert engine._stored_conversion(model) == b"converted"
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(engine.Path, "home", homeless)
    assert engine._cache_path(model) is None
    assert engine._stored_conversion(model) == b"converted"
    # Weights that were never saved have no name to keep them under.
    assert engine._cache_path(active_model(make_plan())) is None


# ---- silence

CHILD = """
import os, sys, threading
attempts = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # processes that this one forks write here too
def forbid(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        os.write(attempts, f"{event} {arguments}\\n".encode())
        raise OSError("no network here")
sys.addaudithook(forbid)
if sys.argv[1] == "tokenseg":
    import torch
    from tokenseg.saved_model.checkpoint import load_model
    from tokenseg.inference.engine import choose_engine
    chosen = choose_engine([load_model(sys.argv[3])], "openvino", threads=1)
    chosen.models[0].compiled(torch.zeros(1, 1, 20, 20, 20))
    assert sys.modules.get("openvino_telemetry") is None
else:
    import openvino
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join(5)
"""


def in_a_child(folder: Path, *arguments: str) -> tuple[str, list[str]]:
    """What a process with a home of its own tried to reach, and the folders in which it left files."""
    home, attempts = folder / "home", folder / "attempts.txt"
    home.mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS")}
    command = [sys.executable, "-c", CHILD, arguments[0], str(attempts), *arguments[1:]]
    subprocess.run(command, env=kept | {"HOME": str(home)}, check=True, timeout=120)
    return attempts.read_text(), sorted(
        {str(file.parent.relative_to(home)) for file in home.rglob("*") if file.is_file()}
    )


def test_nothing_is_sent_and_nothing_written_but_the_cache(tmp_path):
    save_untrained(tmp_path / "model", make_plan())
    attempts, folders = in_a_child(tmp_path / "ours", "tokenseg", str(tmp_path / "model"))
    assert attempts == ""
    assert folders == [".cache/tokenseg/openvino"]


def test_openvino_alone_would_report(tmp_path):
    """So the test above would notice."""
    attempts, folders = in_a_child(tmp_path, "openvino")
    assert "google-analytics" in attempts
    assert "intel" in folders


def test_the_telemetry_package_stays_importable():
    engine._import_openvino()
    import openvino_telemetry

    assert openvino_telemetry.__name__ == "openvino_telemetry"


# ---- signals

INTERRUPTED = """
import os, signal, time, torch
from tokenseg.inference.engine import compile_openvino
forward = compile_openvino(torch.nn.ReLU(), 1, threads=1, precision="fp32")
for length in (8, 9):
    forward(torch.zeros(1, 1, length, 8, 8))
del forward
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_signals_are_handled_after_compiled_models_are_gone():
    """OpenVINO's cores, dropped oldest first, leave the place where handlers run unmapped."""
    told = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert (told.returncode, told.stdout) == (0, "interrupted\n"), told.stderr


# ---- command line


@pytest.mark.usefixtures("in_fp32")
def test_segment_gives_the_same_mask(tmp_path, capsys):
    plan = make_plan(window_vox=(24, 24, 24)).model_copy(update={"labels": labels_of(ball=3)})
    folds = [active_model(plan, seed) for seed in (0, 1)]
    for number, model in enumerate(folds):
        save_model(tmp_path / f"fold{number}", model.network, model.facts)
    write_nifti(tmp_path / "scan.nii.gz", phantom(0)[0][0])
    masks = {}
    for name in ("torch", "openvino"):
        mask = tmp_path / f"{name}.nii.gz"
        models = ["--model", str(tmp_path / "fold0"), "--folds", str(tmp_path / "fold1")]
        assert main(["segment", str(tmp_path / "scan.nii.gz"), str(mask), *models, "--engine", name]) == 0
        assert f"engine: {name}, fp32, cpu" in capsys.readouterr().err
        masks[name] = read_mask(mask).array
    assert set(np.unique(masks["torch"])) == {0, 3}
    assert (masks["torch"] != masks["openvino"]).mean() < 1e-3


def test_segment_says_why_torch_computes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "_convert", lambda *_: 1 / 0)
    save_untrained(tmp_path / "model", make_plan())
    write_nifti(tmp_path / "scan.nii.gz", phantom(0)[0][0])
    arguments = ["segment", str(tmp_path / "scan.nii.gz"), str(tmp_path / "mask.nii.gz")]
    assert main([*arguments, "--model", str(tmp_path / "model")]) == 0
    said = capsys.readouterr().err
    assert "note: OpenVINO cannot take this model (division by zero); torch computes" in said
    assert "engine: torch, " in said
    assert main([*arguments, "--model", str(tmp_path / "model"), "--engine", "openvino"]) == 2
    assert "error: OpenVINO cannot take this model (division by zero); use --engine torch" in capsys.readouterr().err
