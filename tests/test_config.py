"""Settings: what is refused and in which words, and the TOML file they live in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import ValidationError

from plans import THICK_SLICES, make_plan
from tokenseg.config import (
    PRESETS,
    ChannelNormalisation,
    NetworkConfig,
    Plan,
    PresetName,
    RunConfig,
    TrainConfig,
    build_run_config,
    parse_settings,
    read_overrides,
    read_run_config,
    write_run_config,
)
from tokenseg.errors import ConfigError
from tokenseg.options import TrainOptions


def write_toml(folder: Path, tables: dict[str, Any]) -> Path:
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path


def changed_plan(**changes: object) -> Plan:
    return Plan.model_validate(make_plan(2, 2).model_dump() | changes)


def test_all_faults_are_reported_at_once_with_dotted_keys(tmp_path: Path) -> None:
    path = write_toml(
        tmp_path,
        {
            "plan": {
                "spacing_mm": [1.0, -1.0, 1.0],
                "window": 3,
                "strides": [[2, 2, 3], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
            },
            "network": {"num_kept": 0, "quantizer": "vqq", "widths": [8, 0, 8, 8]},
            "train": {"learning_rate": "fast", "warmup_fraction": 1.5},
        },
    )
    with pytest.raises(ConfigError) as caught:
        build_run_config(make_plan(), PRESETS["tiny"], read_overrides(path))
    lines = str(caught.value).splitlines()
    assert lines[0] == "config file has 8 fault(s):"
    assert {line.strip().split(": ")[0] for line in lines[1:]} == {
        "plan.spacing_mm.1",
        "plan.window",
        "plan.strides.0.2",
        "network.num_kept",
        "network.quantizer",
        "network.widths.1",
        "train.learning_rate",
        "train.warmup_fraction",
    }
    text = str(caught.value)
    assert "plan.spacing_mm.1: Input should be greater than 0" in text
    assert "plan.window: Extra inputs are not permitted" in text
    assert "network.quantizer: Input should be 'vq', 'fsq' or 'none'" in text
    assert "train.learning_rate: Input should be a valid number" in text


def test_a_fault_of_the_whole_is_said_to_be_of_the_whole() -> None:
    with pytest.raises(ConfigError, match=r"model card has 1 fault\(s\):\n  \(whole\): Input should be a valid dict"):
        parse_settings(Plan, 3, source="model card")


@pytest.mark.parametrize("tables", [{"plans": {}, "seed": 3}, {"network": {}, "plans": {"x": 1}, "seed": [1]}])
def test_unknown_tables_and_bare_keys_are_refused(tables: dict[str, Any], tmp_path: Path) -> None:
    path = write_toml(tmp_path, tables)
    with pytest.raises(ConfigError) as caught:
        read_overrides(path)
    assert str(caught.value) == (
        f"config file {path}: unknown top-level keys plans, seed; allowed are the tables [plan], [network], [train]"
    )


def test_a_table_given_as_a_bare_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown top-level keys plan; allowed are the tables"):
        read_overrides(write_toml(tmp_path, {"plan": 3}))


def test_missing_config_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml cannot be read: No such file or directory; check the path"):
        read_overrides(tmp_path / "absent.toml")


@pytest.mark.parametrize("content", [b"[plan\n", b"\xff\xfe\x00", b"a = 1\na = 2\n"])
def test_files_that_are_not_toml(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.toml is not valid TOML: "):
        read_overrides(path)


def test_overrides_replace_planned_values_and_leave_the_rest() -> None:
    overrides = {"plan": {"window_vox": [16, 24, 32]}, "network": {"num_kept": 50}, "train": {"weight_decay": 0}}
    config = build_run_config(make_plan(), PRESETS["tiny"], overrides)
    assert config == RunConfig(
        plan=make_plan().model_copy(update={"window_vox": (16, 24, 32)}),
        network=PRESETS["tiny"].model_copy(update={"num_kept": 50}),
        train=TrainConfig(weight_decay=0.0),
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_run_config_round_trip(preset: PresetName, tmp_path: Path) -> None:
    plan = make_plan(2, 3, regions=True, spacing_mm=(0.3, 1 / 3, 1e-3), strides=THICK_SLICES, grid=(5, 5, 4))
    plan = Plan.model_validate(
        plan.model_dump()
        | {
            "channels": ["c1", "c1 - c0"],
            "joint_zscore": True,
            "normalisation": [
                {"kind": "window", "low": -1024.0, "high": 0.1 + 0.2, "mean": -1e-7, "std": 1e20},
                {"kind": "zscore"},
            ],
            "reasons": {"spacing_mm": 'median of 3 cases; "µm" = […]\n\\ \'', "a.b": ""},
        }
    )
    config = RunConfig(plan=plan, network=PRESETS[preset], train=TrainConfig(learning_rate=1 / 3))
    path = tmp_path / "new folder" / "config.toml"
    write_run_config(path, config)
    assert read_run_config(path) == config
    assert path.read_text(encoding="utf-8").startswith("# TokenSeg run configuration.")


def test_incomplete_run_config_names_what_is_missing(tmp_path: Path) -> None:
    path = write_toml(tmp_path, {"network": PRESETS["tiny"].model_dump()})
    with pytest.raises(ConfigError) as caught:
        read_run_config(path)
    assert str(caught.value) == f"config file {path} has 1 fault(s):\n  plan: Field required"


def test_presets_are_what_they_are_asked_to_be() -> None:
    assert list(PRESETS) == ["tiny", "small", "paper"]
    for preset in PRESETS.values():
        assert NetworkConfig.model_validate(preset.model_dump(mode="json")) == preset
        assert preset.num_kept == 100
        assert preset.quantizer == "vq"
    assert PRESETS["paper"].codebook_size == 4096


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="Instance is frozen"):
        PRESETS["tiny"].num_kept = 3


def test_one_normalisation_a_channel() -> None:
    with pytest.raises(ValidationError, match="normalisation has 1 entries for 2 channels; give one each"):
        changed_plan(normalisation=[ChannelNormalisation(kind="zscore")])


def test_channels_come_from_the_source_channels() -> None:
    with pytest.raises(ValidationError, match="channels names 't2', source_channels has c0, c1"):
        changed_plan(channels=["c0", "c1 - t2"])


def test_labels_have_values_of_their_own() -> None:
    labels = [label.model_dump() | {"output_value": 7} for label in make_plan(1, 2).labels]
    with pytest.raises(ValidationError, match=r"labels share an output_value: \[7, 7\]"):
        changed_plan(labels=labels)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"channels": []}, "channels"),
        ({"labels": []}, "labels"),
        ({"spacing_mm": [1.0, 1.0, 0.0]}, "spacing_mm.2"),
        ({"spacing_mm": [1.0, float("inf"), 1.0]}, "spacing_mm.1"),
        ({"grid": [4, 5, 0]}, "grid.2"),
        ({"window_vox": [16, 16]}, "window_vox.2"),
        ({"strides": [[2, 2, 2]] * 3}, "strides.3"),
        ({"strides": [[4, 2, 2]] + [[2, 2, 2]] * 3}, "strides.0.0"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": 0}, "steps"),
    ],
)
def test_plan_values_out_of_range(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^plan has 1 fault\(s\):\n  {key}: "):
        parse_settings(Plan, make_plan(2, 2).model_dump() | changes, source="plan")


def test_more_than_8_channels_are_refused() -> None:
    with pytest.raises(ValidationError, match="at most 8 items"):
        make_plan(9)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"widths": (8, 8, 8)}, "widths.3"),
        ({"blocks": (1, 1, 1, 0)}, "blocks.3"),
        ({"token_width": 30}, "token_width"),
        ({"codebook_size": 1}, "codebook_size"),
        ({"mixer_layers": -1}, "mixer_layers"),
    ],
)
def test_network_values_out_of_range(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^network has 1 fault\(s\):\n  {key}: "):
        parse_settings(NetworkConfig, PRESETS["tiny"].model_dump() | changes, source="network")


def test_what_a_plan_says_of_itself() -> None:
    plan = changed_plan(channels=["c1", "c1 - c0"])
    assert plan.needed_channels == ("c1", "c0")
    assert plan.num_outputs == 3
    assert plan.model_copy(update={"regions": True}).num_outputs == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TrainOptions(max_minutes=1.0, max_steps=1), "--max-minutes and --max-steps are both given; give one of them"),
        (TrainOptions(max_minutes=0.0), "--max-minutes 0.0: must be above 0"),
        (TrainOptions(max_minutes=float("nan")), "--max-minutes nan: must be above 0"),
        (TrainOptions(max_steps=0), "--max-steps 0: must be at least 1"),
        (TrainOptions(threads=0), "--threads 0: must be at least 1"),
        (TrainOptions(fold=-1), "--fold -1: must be at least 0"),
        (TrainOptions(seed=-1), "--seed -1: must be at least 0"),
    ],
)
def test_training_options_that_cannot_be_meant(options: TrainOptions, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options.check()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "options",
    [TrainOptions(), TrainOptions(max_minutes=0.1), TrainOptions(max_steps=1, threads=1), TrainOptions(fold="all")],
)
def test_training_options_that_are_fine(options: TrainOptions) -> None:
    options.check()
