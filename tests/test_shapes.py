"""One legend for the axes of all arrays: nothing in use that it lacks, nothing in it that nobody uses."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import jaxtyping
import pytest

import tokenseg.shapes

SOURCES = sorted((Path(__file__).parents[1] / "src" / "tokenseg").rglob("*.py"))
ARRAY_TYPES = {name for name in dir(jaxtyping) if isinstance(getattr(jaxtyping, name), type)}


def axes_of(source: str) -> set[str]:
    """Names of axes in the array types of a module; fixed lengths and what may be anything are left out."""
    names = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).split(".")[-1] in ARRAY_TYPES:
            shape = ast.literal_eval(node.slice.elts[1])
            names |= set() if shape is ... else {axis.lstrip("*#?") for axis in shape.split()}
    return {name for name in names if not re.fullmatch(r"_.*|\.\.\.|\d+|", name)}


def legend() -> list[str]:
    entries = re.findall(r"^    (\S+(?: \S+)*)  +\S", tokenseg.shapes.__doc__ or "", flags=re.MULTILINE)
    return [name for entry in entries for name in entry.split()]


def test_the_axes_of_a_module_are_found():
    source = """
Plain: TypeAlias = Literal["no", "shape"]
def moved(image: Float[Tensor, "B #C 3"], mask: jaxtyping.Bool[np.ndarray, "*shape"]) -> Int[Tensor, "_ ... n"]: ...
"""
    assert axes_of(source) == {"B", "C", "shape", "n"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(path.parents[1])))
def test_every_axis_is_in_the_legend(path: Path):
    assert axes_of(path.read_text(encoding="utf-8")) - set(legend()) == set()


def test_the_legend_has_each_axis_once_and_none_that_nobody_uses():
    assert len(legend()) == len(set(legend()))
    used = {name for path in SOURCES for name in axes_of(path.read_text(encoding="utf-8"))}
    assert set(legend()) - used == set()
