"""Rules about the code as a whole: who imports whom, no pickle, a command line that starts fast, small modules."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src" / "tokenseg").rglob("*.py"))
SOURCE_IDS = [str(path.relative_to(ROOT / "src")) for path in SOURCES]

MAX_MODULE_LINES = 400
MAX_WING_MODULES = 14
GROUND = {
    "about",
    "config",
    "device",
    "errors",
    "files",
    "messages",
    "options",
    "outputs",
    "processes",
    "progress",
    "shapes",
    "stopwatch",
}
DOORS = {"__init__", "__main__", "cli", "demo"}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.save", "torch.load", "torch.hub"}
NO_NOUNS = {
    *("what", "whether", "how", "which", "where", "when", "why", "who"),
    *("from", "to", "in", "on", "by", "for", "of", "with", "behind", "beyond"),
    *("finding", "opening", "reading", "writing", "loading", "making", "drawing", "checking", "measuring", "taking"),
    *("find", "open", "read", "write", "load", "make", "draw", "check", "measure", "take", "segment"),
}
"""Words with which the first sentence of a module does not say what the module is."""


def imported_modules(tree: ast.AST) -> dict[str, str]:
    """Full dotted name of every name that an import binds."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top_level = alias.name.split(".")[0]
                names[alias.asname or top_level] = alias.name if alias.asname else top_level
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def pickle_faults(source: str) -> list[str]:
    """Places where a module could read or write pickled objects."""
    tree = ast.parse(source)
    names = imported_modules(tree)
    faults = [f"import of {name}" for name in names.values() if name.split(".")[0] in UNPICKLERS]
    faults += [f"import of {name}" for name in names.values() if name in UNSAFE_CALLS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            base, _, rest = ast.unparse(node).partition(".")
            full_name = f"{names.get(base, base)}.{rest}"
            if full_name in UNSAFE_CALLS:
                faults.append(f"{full_name} in line {node.lineno}")
        if isinstance(node, ast.Call) and not _is_safe_numpy_load(node, names):
            faults.append(f"numpy.load without allow_pickle=False in line {node.lineno}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            faults.append(f"allow_pickle={ast.unparse(node.value)} in line {node.lineno}")
    return faults


def _is_safe_numpy_load(call: ast.Call, names: dict[str, str]) -> bool:
    base, _, rest = ast.unparse(call.func).partition(".")
    full_name = ".".join(filter(None, (names.get(base, base), rest)))
    return full_name != "numpy.load" or any(keyword.arg == "allow_pickle" for keyword in call.keywords)


def test_import_contracts_hold():
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize("path", SOURCES, ids=SOURCE_IDS)
def test_no_module_can_read_or_write_a_pickle(path: Path):
    assert pickle_faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import pickle", "import of pickle"),
        ("from joblib import dump as write", "import of joblib.dump"),
        ("import torch\ntorch.save({}, 'x')", "torch.save in line 2"),
        ("import torch as t\nread = t.load", "torch.load in line 2"),
        ("from torch import load", "import of torch.load"),
        ("import numpy as np\nnp.load('x.npy')", "numpy.load without allow_pickle=False in line 2"),
        ("from numpy import load\nload('x.npy')", "numpy.load without allow_pickle=False in line 2"),
        ("import numpy as np\nnp.load('x.npy', allow_pickle=True)", "allow_pickle=True in line 2"),
    ],
)
def test_the_pickle_check_finds_what_it_should(source: str, fault: str):
    assert pickle_faults(source) == [fault]
    assert pickle_faults("import numpy as np\nnp.load('x.npy', allow_pickle=False).torch.load") == []


@pytest.mark.parametrize("path", SOURCES, ids=SOURCE_IDS)
def test_modules_are_small(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_MODULE_LINES


@pytest.mark.parametrize("path", SOURCES, ids=SOURCE_IDS)
def test_a_module_says_first_what_it_is(path: Path):
    """`Scores of masks`, not `How good masks are`; `The command ...`, not a bare name in backticks."""
    first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "what").split()[0]
    assert not first.startswith("`")
    assert first.strip(",:;.").lower() not in NO_NOUNS


def test_modules_lie_in_wings():
    """A folder says what its modules are about; at the root lies the ground that all stand on, and the doors."""
    package = ROOT / "src" / "tokenseg"
    assert {path.stem for path in package.glob("*.py")} == GROUND | DOORS
    wings = {path.parent for path in SOURCES} - {package}
    crowded = {wing.name: count for wing in wings if (count := len(list(wing.glob("*.py"))) - 1) > MAX_WING_MODULES}
    assert crowded == {}
    assert [wing.name for wing in wings if not (wing / "__init__.py").is_file()] == []


@pytest.mark.parametrize("module", ["tokenseg", "tokenseg.cli"])
def test_the_command_line_loads_no_torch(module: str):
    heavy = ("torch", "monai", "lightning_fabric", "nibabel", "scipy")
    code = f"import {module}, sys; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom tokenseg.cli import main\nsys.argv = ['tokenseg', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code or 0, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1:] == ["0 False"], result.stderr


def test_the_lock_pins_every_direct_dependency_to_public_versions():
    pins = dict(
        line.replace("_", "-").split("==")
        for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    wanted = [Requirement(text) for group in [*groups, project["build-system"]["requires"]] for text in group]
    unmet = [str(want) for want in wanted if want.name != "tokenseg" and pins.get(want.name, "0") not in want.specifier]
    assert unmet == []
    assert [version for version in pins.values() if "+" in version] == []
