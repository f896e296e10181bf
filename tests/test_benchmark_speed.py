from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import tokenseg.inference.memory
from tokenseg.benchmark import frontier
from tokenseg.benchmark.frontier import Point, read_dice, speed_name, write_frontier
from tokenseg.benchmark.rows import Row, append, read_rows
from tokenseg.benchmark.speed import end_to_end, memory, worker
from tokenseg.benchmark.speed import run as speed
from tokenseg.benchmark.speed.latency import interleave, ratio, summarise
from tokenseg.benchmark.speed.memory import Ended, peak_mib, run_limited
from tokenseg.benchmark.speed.networks import NETWORKS, TOKENSEG, build_network
from tokenseg.benchmark.speed.options import DEFAULT_NETWORKS, SpeedOptions
from tokenseg.benchmark.speed.passes import Setting, count, forward_pass, training_step
from tokenseg.benchmark.speed.rows import COLUMNS, like, newest
from tokenseg.benchmark.speed.table import table_text
from tokenseg.benchmark.speed.worker import Job, Result, do, fault_text, from_json, to_json
from tokenseg.cli import main
from tokenseg.errors import ConfigError, FileError
from tokenseg.inference.memory import available_mib
from tokenseg.model.blocks import Convolution
from tokenseg.segmentation import provenance as manifest

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:monai")

SETTING = Setting(32, "fp32", "torch", "cpu", 1)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much a process used at most")


@pytest.fixture(autouse=True)
def same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def row(**values: str) -> Row:
    defaults = {
        **{"stage": "forward", "network": "tokenseg-small", "parameters_m": "5.00", "device": "cpu"},
        **{"engine": "torch", "precision": "fp32", "size": "100", "threads": "2", "median_ms": "500.0"},
        **{"min_ms": "400.0", "max_ms": "600.0"},
    }
    return dict.fromkeys(COLUMNS, "") | defaults | values


# ---- times


class FakeClock:
    """Works advance it by a known time; each look costs nothing."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, ""

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: list[float]):
        left = iter(seconds)

        def run() -> None:
            self.log += name
            self.now += next(left)

        return run


def test_works_run_in_turn_and_each_keeps_its_own_time():
    clock = FakeClock()
    works = [clock.work("A", [1, 2, 3]), clock.work("B", [10, 20, 60])]
    assert interleave(works, 3, clock=clock) == [[1, 2, 3], [10, 20, 60]]
    assert clock.log == "ABABAB"


def test_slow_works_get_fewer_rounds_but_at_least_one():
    clock = FakeClock()
    assert interleave([clock.work("A", [70, 70, 70])], 3, clock=clock) == [[70, 70]]
    assert interleave([clock.work("A", [500])], 3, clock=clock) == [[500]]


def test_summary_and_ratio_by_hand():
    assert summarise([0.002, 0.001, 0.006]) == (3, 2, 1, 6)
    # The machine slows down to a third in the last round; within each round the ratio is 2.
    assert ratio([2.0, 4.0, 18.0], [1.0, 2.0, 9.0]) == 2
    assert ratio([2.0, 4.0, 30.0], [1.0, 4.0, 10.0]) == 2


# ---- operations and memory


def test_operations_of_one_convolution_by_hand(monkeypatch):
    # 32^3 outputs of 4 channels, each from 27 x 1 inputs; a multiplication and an addition.
    network = nn.Conv3d(1, 4, 3, padding=1)
    counted = count(network, SETTING)
    assert counted.gflop == 2 * 32**3 * 4 * 27 / 1e9
    assert counted.parameters_m == (4 * 27 + 4) / 1e6
    assert count(Convolution(1, 4), SETTING) == (4 * 27 / 1e6, counted.gflop)


@needs_linux
def test_peak_is_that_of_an_array_of_known_size():
    code = (
        "import numpy as np\nfrom tokenseg.benchmark.speed.memory import peak_mib\n"
        "kept = np.ones(30 * 2**20 // 8)\n"
        "print(peak_mib(lambda: np.ones(100 * 2**20 // 8).sum()))"
    )
    figures = memory.subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(figures.stdout) == pytest.approx(100, rel=0.2)


def test_without_proc_there_is_no_figure_and_no_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_PROCESS", tmp_path)
    assert peak_mib(lambda: pytest.fail("not needed")) is None
    monkeypatch.setattr(tokenseg.inference.memory, "_MEMINFO", tmp_path / "meminfo")
    assert available_mib() is None


def test_what_a_container_may_use_counts_if_it_is_less(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 2048000 kB\n")
    monkeypatch.setattr(tokenseg.inference.memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(tokenseg.inference.memory, "_CGROUP", tmp_path)
    assert available_mib() == 2000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{300 * 2**20}\n")
    assert available_mib() == 2000
    (tmp_path / "memory.max").write_text(f"{1000 * 2**20}\n")
    assert available_mib() == 700


@needs_linux
def test_a_child_over_its_limit_is_ended_at_once():
    started = time.monotonic()
    code = "import time\nheld = bytearray(400 * 2**20)\nheld[::4096] = b'1' * len(held[::4096])\ntime.sleep(60)"
    ended = run_limited([sys.executable, "-c", code], 200.0)
    assert ended.over_limit
    assert ended.code == -9
    assert time.monotonic() - started < 30


def test_a_child_within_its_limit_is_left_alone():
    code = "import sys\nprint('dropped')\nprint('a fault', file=sys.stderr)\nsys.exit(3)"
    assert run_limited([sys.executable, "-c", code], 10_000.0) == Ended(3, False, "a fault\n")
    assert run_limited([sys.executable, "-c", ""], None) == Ended(0, False, "")


# ---- networks, and what is done with one


def test_names_are_presets_with_parts_left_out_and_peers():
    assert set(DEFAULT_NETWORKS) <= set(NETWORKS)
    assert {name: (config.tokens, config.refine_fraction > 0) for name, config in TOKENSEG.items()} == {
        f"tokenseg-{size}{ending}": parts
        for size in ("small", "paper")
        for ending, parts in {
            "": (TOKENSEG[f"tokenseg-{size}"].tokens, True),
            "-no-tokens": (False, True),
            "-no-refinement": (TOKENSEG[f"tokenseg-{size}"].tokens, False),
            "-plain": (False, False),
        }.items()
    }
    with pytest.raises(ConfigError, match="no network is called unet; choose from tokenseg-small, tokenseg-small-no"):
        build_network("unet", (32, 32, 32))


def test_a_window_is_at_most_the_customary_one_but_unetrs_is_the_size():
    sizes = {
        size: sum(p.numel() for p in build_network("monai-dynunet", (size,) * 3).parameters()) for size in (128, 256)
    }
    assert sizes[128] == sizes[256]
    unetr = build_network("monai-unetr", (160, 32, 32))
    assert unetr.network.vit.patch_embedding.position_embeddings.shape[1] == 10 * 2 * 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_passes_run_in_the_precision_asked_for(precision):
    setting = SETTING._replace(precision=precision)
    timed = forward_pass("tokenseg-small-plain", setting)
    seen = []
    convolution = next(module for module in timed.network.modules() if isinstance(module, nn.Conv3d))
    convolution.register_forward_hook(lambda *values: seen.append(values[-1].dtype))
    timed.run()
    assert seen == [{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]]
    assert not timed.network.training


def test_a_training_step_changes_the_weights():
    timed = training_step("tokenseg-small-plain", SETTING)
    before = [parameter.detach().clone() for parameter in timed.network.parameters()]
    timed.run()
    assert timed.network.training
    assert any(not torch.equal(*pair) for pair in zip(before, timed.network.parameters(), strict=True))
    with pytest.raises(ConfigError, match="openvino is for inference; training steps are measured with torch"):
        training_step("tokenseg-small-plain", SETTING._replace(engine="openvino"))


def test_the_compile_engine_runs_what_torch_compiles(monkeypatch):
    compiled = []

    def fake(network: nn.Module) -> nn.Module:
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", fake)
    timed = forward_pass("tokenseg-small-plain", SETTING._replace(engine="torch-compile"))
    timed.run()
    assert compiled == [timed.network]


def test_the_openvino_engine_gets_the_network_as_it_is(monkeypatch):
    from tokenseg.inference import engine

    compiled, ran = [], []

    def fake(network: nn.Module, channels: int, *, threads: int, precision: str):
        compiled.append((network, channels, threads, precision))
        return ran.append

    monkeypatch.setattr(engine, "compile_openvino", fake)
    monkeypatch.setattr(engine, "is_installed", lambda: True)
    setting = SETTING._replace(engine="openvino", precision="bf16", threads=3)
    timed = forward_pass("tokenseg-small-plain", setting)
    timed.run()
    assert compiled == [(timed.network, 1, 3, "bf16")]
    assert ran[0].shape == (1, 1, 32, 32, 32)
    monkeypatch.setattr(engine, "is_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"openvino is not installed: pip install 'tokenseg\[openvino\]'"):
        forward_pass("tokenseg-small-plain", setting)


def test_jobs_survive_their_text():
    job = Job("latency", ("a", "b"), SETTING, rounds=3, training=True)
    assert from_json(to_json(job)) == job


def test_a_job_in_this_process():
    latency = do(Job("latency", ("tokenseg-small-plain", "tokenseg-small-plain"), SETTING, rounds=2))
    assert latency.fault == ""
    assert [len(seconds) for seconds in latency.seconds] == [2, 2]
    assert latency.parameters_m > 3
    # The path that a process takes: a file in, a file out.
    step = do(Job("latency", ("tokenseg-small-plain",), SETTING, training=True))
    assert (len(step.seconds), step.gflop) == (1, None)
    weighed = do(Job("memory", ("tokenseg-small-plain",), SETTING, training=True))
    assert weighed.fault == ""


def test_the_worker_reads_a_job_and_writes_its_result(tmp_path):
    (tmp_path / "job.json").write_text(to_json(Job("memory", ("nobody",), SETTING)))
    worker.main([str(tmp_path / "job.json"), str(tmp_path / "result.json")])
    fault = json.loads((tmp_path / "result.json").read_text())["fault"]
    assert fault.startswith("not possible: no network is called nobody; choose from")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "does not fit into memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "does not fit into memory",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "does not fit into memory"),
        (ValueError("one\ntwo"), "not possible: one"),
        (RuntimeError(), "not possible: RuntimeError"),
    ],
)
def test_faults_are_one_line(error, text):
    assert fault_text(error) == text


def test_stages_of_a_scan():
    seconds = end_to_end.stage_seconds("tokenseg-small-plain", torch.device("cpu"), 2, scan_vox=(48, 40, 32))
    assert list(seconds) == list(end_to_end.STAGES)
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
    with pytest.raises(ConfigError, match="end to end is measured with TokenSeg, not with monai-unet; name one first"):
        end_to_end.stage_seconds("monai-unet", torch.device("cpu"), 1)


# ---- rows


def test_rows_are_added_and_earlier_ones_stay(tmp_path):
    path = tmp_path / "speed.csv"
    append(path, COLUMNS, [row(network="one", note='with "quotes", and a comma')])
    before = path.read_bytes()
    append(path, COLUMNS, [row(network="two"), row(network="three")])
    assert path.read_bytes().startswith(before)
    assert [each["network"] for each in read_rows(path, COLUMNS)] == ["one", "two", "three"]
    assert read_rows(path, COLUMNS)[0] == row(network="one", note='with "quotes", and a comma')


def test_a_file_of_something_else_is_left_as_it_is(tmp_path):
    path = tmp_path / "speed.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"speed.csv has other columns than this benchmark writes; name another"):
        append(path, COLUMNS, [row()])
    assert path.read_text() == "a,b\n1,2\n"
    path.write_text(",".join(COLUMNS) + "\n1,2\n")
    with pytest.raises(ConfigError, match="has other columns"):
        read_rows(path, COLUMNS)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(FileError, match=r"speed.csv is not text; name another file"):
        read_rows(path, COLUMNS)
    path.write_text("a line of theirs without an end")
    with pytest.raises(ConfigError, match="has other columns"):
        append(path, COLUMNS, [row()])
    assert path.read_text() == "a line of theirs without an end"
    path.write_text(",".join(COLUMNS)[:9])
    append(path, COLUMNS, [row()])
    assert read_rows(path, COLUMNS) == [row()]


def test_rows_of_the_same_conditions_and_the_newest_of_them():
    rows = [row(median_ms="1"), row(threads="1"), row(network="other"), row(median_ms="2")]
    assert like([row()], rows) == [rows[0], rows[2], rows[3]]
    assert newest(rows) == [rows[3], rows[1], rows[2]]


def test_the_committed_rows_can_be_read():
    rows = read_rows(Path(__file__).parents[1] / "benchmarks" / "speed.csv", COLUMNS)
    assert {"tokenseg-small", "monai-unet", "nnunet-plainconv"} <= {each["network"] for each in rows}
    assert all(each["median_ms"] or each["note"] for each in rows)


def test_the_table_by_hand():
    rows = [
        row(reference="tokenseg-small", gflop="88.7", peak_mib="280"),
        row(network="unet", reference="tokenseg-small", median_ms="1000.0", ratio="2.004"),
        row(network="swin", median_ms="", parameters_m="", note="does not fit"),
    ]
    assert table_text(rows).splitlines() == [
        "100 cubed, fp32, torch on cpu, 2 thread(s), ratio to tokenseg-small",
        "network         M par.  GFLOP          ms (min to max)  s/Mvox  ratio  MiB",
        "tokenseg-small    5.00   88.7   500.0 (400.0 to 600.0)   0.500         280",
        "unet              5.00         1000.0 (400.0 to 600.0)   1.000  2.00x",
        "swin                                                                        does not fit",
    ]
    stages = [row(stage="load", size="256 x 256 x 160"), row(stage="save", size="256 x 256 x 160", median_ms="7.0")]
    assert table_text(stages).splitlines() == [
        "tokenseg-small from file to file, 256 x 256 x 160 at 0.7 mm, fp32, torch on cpu, 2 thread(s)",
        "stage  ms (min to max)",
        "load   500.0 (400.0 to 600.0)",
        "save   7.0 (400.0 to 600.0)",
    ]
    trained = table_text([row(training_median_ms="9.0", training_min_ms="8.0", training_max_ms="10.0")])
    assert "9.0 (8.0 to 10.0)" in trained
    assert "step MiB" in trained


# ---- the picture


def test_the_frontier_is_what_nothing_beats():
    points = [Point("a", 1, 5), Point("b", 2, 4), Point("c", 3, 9), Point("d", 3, 8), Point("e", 4, 1)]
    names = {more: [p.network for p in frontier.frontier(points, more_is_better=more)] for more in (True, False)}
    assert names == {True: ["a", "c"], False: ["a", "b", "e"]}


def test_dice_comes_under_the_names_of_the_speed_rows(tmp_path):
    path = tmp_path / "accuracy.csv"
    path.write_text(
        "network,dice,dataset\ntokenseg,0.8,x\ntokenseg,0.9,x\ntokenseg-no-tokens,0.7,x\nvnet,,x\nunet,0.5,x\n"
    )
    assert read_dice(path) == pytest.approx({"tokenseg-small": 0.85, "tokenseg-small-no-tokens": 0.7, "unet": 0.5})
    assert speed_name("tokenseg-paper") == "tokenseg-paper"
    path.write_text("network,dice,dataset\nunet,0.5,x\nunet,0.9,y\n")
    with pytest.raises(ConfigError, match="has rows of 2 different datasets, folds or budgets"):
        read_dice(path)
    path.write_text("network\nunet\n")
    with pytest.raises(ConfigError, match="has no rows with columns network and dice"):
        read_dice(path)
    with pytest.raises(FileError, match="cannot be read"):
        read_dice(tmp_path / "none.csv")


def test_the_picture_shows_each_network_once_in_each_condition(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn: list[tuple[str, float, float]] = []
    annotate = Axes.annotate

    def spying(axes: Axes, text: str, xy: tuple[float, float], **options: object) -> object:
        drawn.append((text, *xy))
        return annotate(axes, text, xy, **options)

    monkeypatch.setattr(Axes, "annotate", spying)
    rows = [
        row(),
        row(median_ms="50"),
        row(network="unet", parameters_m="19", median_ms="100"),
        row(network="swin", median_ms="", note="does not fit"),
        row(precision="bf16"),
        row(stage="load"),
    ]
    write_frontier(tmp_path / "speed.png", rows)
    assert drawn == [("tokenseg-small", 50, 5), ("unet", 100, 19), ("tokenseg-small", 500, 5)]
    assert (tmp_path / "speed.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    drawn.clear()
    write_frontier(tmp_path / "dice.png", rows, {"unet": 0.8})
    assert drawn == [("unet", 100, 0.8)]
    with pytest.raises(ConfigError, match="no network has both a time and a value"):
        write_frontier(tmp_path / "none.png", rows, {"other": 0.8})


def test_labels_cover_neither_each_other_nor_points(monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    labels, boxes = [], []
    annotate, spread = Axes.annotate, frontier._spread
    monkeypatch.setattr(Axes, "annotate", lambda *args, **kw: labels.append(annotate(*args, **kw)) or labels[-1])

    def measuring(axes, panel, own, renderer):
        spread(axes, panel, own, renderer)
        boxes.extend(label.get_window_extent(renderer) for label in own)
        assert all(axes.bbox.count_contains([box.min, box.max]) == 2 for box in boxes)
        for point in panel.points[:-1]:
            at = axes.transData.transform((point.ms, point.value))
            assert not any(box.contains(*at) for box in boxes)

    monkeypatch.setattr(frontier, "_spread", measuring)
    crowd = [Point(f"network-{n}", 1000 + 40 * n, 0.88 + 0.001 * n, (0.87, 0.9)) for n in range(5)]
    panel = frontier.Panel("crowded", [*crowd, Point("far below", 2000, 0.5)], floor=0.7)
    content = frontier.drawn([panel], frontier.Look("ms", "Dice"), {"Rows": "none"})
    assert b"Rows" in content
    assert [label.get_text() for label in labels] == [point.network for point in crowd]
    assert not any(one.overlaps(other) for at, one in enumerate(boxes) for other in boxes[:at])


# ---- the command


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"networks": ("a", "a")}, "--networks a a: give one or several, each once"),
        ({"sizes": ()}, r"--sizes \(nothing\): give one or several, each once"),
        ({"sizes": (64, 100)}, "--sizes 100: must be a multiple of 32"),
        ({"sizes": (0,)}, "--sizes 0: must be a multiple of 32"),
        ({"threads": 0}, "--threads 0: must be at least 1"),
        ({"rounds": 0}, "--rounds 0: must be at least 1"),
        ({"accuracy": Path("a.csv")}, "--accuracy is for the picture; give --plot FILE.png too"),
        ({"networks": ("tokenseg-small", "unet")}, "no network is called unet; choose from"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        speed.measure_speed(SpeedOptions(**options))


@pytest.fixture
def faults(monkeypatch):
    """Measuring without processes: networks by name that cannot run, or cannot train; each job takes known times."""
    broken: dict[str, str] = {}
    jobs: list[Job] = []

    def run(job: Job) -> Result:
        jobs.append(job)
        for name in job.networks:
            fault = broken.get(f"{name} training" if job.training else name, "")
            if fault:
                return Result(fault=fault)
        if job.task == "memory":
            return Result(peak_mib=50.4)
        if job.task == "end-to-end":
            return Result(seconds=[[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
        seconds = [[float(number + 1)] for number in range(len(job.networks))]
        return Result(seconds=seconds, parameters_m=1.234, gflop=5.67)

    monkeypatch.setattr(speed, "_run", run)
    broken["jobs"] = jobs  # type: ignore[assignment]
    return broken


def measure(**options: object) -> list[Row]:
    names = ("tokenseg-small", "monai-unet")
    return speed.measure_speed(
        SpeedOptions(**{"networks": names, "sizes": (32,), "precisions": ("fp32",), "threads": 1, **options})
    )


def test_rows_hold_what_was_measured(faults):
    own, other = measure(training=True)
    assert (own["reference"], own["ratio"], own["median_ms"]) == ("tokenseg-small", "", "1000.0")
    assert (other["reference"], other["ratio"], other["training_ratio"]) == ("tokenseg-small", "0.500", "0.500")
    assert (other["parameters_m"], other["gflop"], other["peak_mib"], other["rounds"]) == ("1.23", "5.7", "50", "1")
    assert (other["device"], other["engine"], other["size"], other["threads"]) == ("cpu", "torch", "32", "1")
    assert other["torch"] == torch.__version__.split("+")[0]
    assert tuple(other) == COLUMNS
    jobs = faults["jobs"]
    assert [job.networks for job in jobs if job.task == "latency" and not job.training] == [
        ("tokenseg-small",),
        ("monai-unet", "tokenseg-small"),
    ]
    assert all(len(job.networks) == 1 for job in jobs if job.task == "memory")


def test_openvino_is_timed_and_not_weighed(faults):
    own, other = measure(engines=("openvino",), training=True)
    assert (other["median_ms"], other["peak_mib"], other["engine"]) == ("1000.0", "", "openvino")
    assert own["peak_mib"] == ""
    assert [job.task for job in faults["jobs"] if not job.training] == ["latency", "latency"]


def test_a_network_that_does_not_fit_is_a_row_that_says_so(faults):
    faults["monai-unet"] = "does not fit"
    own, other = measure(training=True)
    assert own["median_ms"]
    assert (other["note"], other["median_ms"], other["peak_mib"], other["reference"]) == ("does not fit", "", "", "")


def test_where_the_reference_does_not_fit_the_others_run_alone(faults):
    faults["tokenseg-small"] = "does not fit"
    own, other = measure()
    assert own["note"] == "does not fit"
    assert (other["median_ms"], other["reference"], other["ratio"]) == ("1000.0", "", "")


def test_a_training_step_that_does_not_fit_leaves_the_forward_pass(faults):
    faults["monai-unet training"] = "does not fit"
    own, other = measure(training=True)
    assert own["training_peak_mib"] == "50"
    assert (other["note"], other["ratio"], other["training_median_ms"]) == ("training: does not fit", "0.500", "")
    faults.pop("monai-unet training")
    faults["tokenseg-small training"] = "does not fit"
    own, other = measure(training=True)
    assert own["note"] == "training: does not fit"
    assert (other["training_median_ms"], other["training_ratio"]) == ("1000.0", "")


def test_a_whole_scan_is_a_row_a_stage_and_their_sum(faults):
    rows = measure(networks=("tokenseg-small",), end_to_end=True)[1:]
    assert [each["stage"] for each in rows] == [*end_to_end.STAGES, "end to end"]
    assert [float(each["median_ms"]) for each in rows] == [1000, 2000, 3000, 4000, 5000, 6000, 21000]
    assert {each["size"] for each in rows} == {"256 x 256 x 160"}
    faults["tokenseg-small"] = "does not fit"
    assert measure(networks=("tokenseg-small",), end_to_end=True)[-1]["note"] == "does not fit"


@needs_linux
def test_a_child_that_is_ended_gives_its_reason(monkeypatch):
    job = Job("memory", ("tokenseg-small",), SETTING)
    monkeypatch.setattr(speed, "available_mib", lambda: 100.0)
    assert speed._run(job).fault == "does not fit into the 90 MiB that it may use"
    monkeypatch.setattr(speed, "run_limited", lambda *_: Ended(-11, False, "Traceback\nSegmentation fault\n"))
    assert speed._run(job).fault == "ended with code -11: Segmentation fault"
    monkeypatch.setattr(speed, "run_limited", lambda *_: Ended(1, False, ""))
    assert speed._run(job).fault == "ended with code 1: without a word"


@pytest.mark.long
def test_the_real_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, plot = tmp_path / "speed.csv", tmp_path / "speed.png"
    arguments = ["--networks", "tokenseg-small", "monai-unet", "--sizes", "32", "--precisions", "fp32"]
    options = ["--threads", "1", "--rounds", "2", "--device", "cpu", "--csv", str(path), "--plot", str(plot)]
    assert main(["benchmark", "speed", *arguments, *options]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "32 cubed, fp32, torch on cpu, 1 thread(s), ratio to tokenseg-small"
    assert [line.split()[0] for line in lines[1:]] == ["network", "tokenseg-small", "monai-unet"]
    assert "measuring 2/2 monai-unet 32 fp32 " in printed.err
    assert f"plot: {plot}" in printed.err
    ours, unet = read_rows(path, COLUMNS)
    # 19.22 million parameters are those of this configuration, counted by hand in its own tests.
    assert unet["parameters_m"] == "19.22"
    assert (ours["ratio"], float(unet["ratio"]) > 0) == ("", True)
    if sys.platform == "linux":
        assert 0 < float(unet["peak_mib"]) < 1000
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_a_foreign_file_is_found_before_the_work(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("a,b\n")
    assert main(["benchmark", "speed", "--csv", str(tmp_path / "rows.csv")]) == 2
    assert "has other columns than this benchmark writes" in capsys.readouterr().err
    assert main(["benchmark", "speed", "--plot", str(tmp_path / "plot.svg")]) == 2
    assert "plot.svg: the name must end in .png" in capsys.readouterr().err


def test_the_commit_is_that_of_this_program_or_nothing(monkeypatch):
    def no_git(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(manifest.subprocess, "run", no_git)
    assert manifest.commit() == ""


def test_the_processor_has_a_name(monkeypatch):
    assert set(manifest.manifest(torch.device("cpu"))) == set(manifest.MANIFEST_COLUMNS)
    monkeypatch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(OSError()))
    monkeypatch.setattr(manifest.platform, "processor", lambda: "a chip")
    assert manifest._cpu() == "a chip"
