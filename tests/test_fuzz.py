"""Thousands of damaged files of each kind: read, or refused with an error of ours; never slow, never a crash."""

from __future__ import annotations

import os

import pytest

from mutants import mutants, read_all
from readable import KINDS

pytestmark = pytest.mark.skipif(os.name != "posix", reason="readers run in a forked process")
SLOW_KINDS = {"status": 10}
"""Here damage means that a scan is segmented again; so many times fewer are tried."""


def read_damaged(kind: str, folder, count: int, seed: int) -> None:
    readable = KINDS[kind](folder)
    assert read_all(readable.read, [readable.content]).read == 1
    options = {"header_bytes": readable.header_bytes, "text": readable.text}
    outcome = read_all(readable.read, mutants(readable.content, count // SLOW_KINDS.get(kind, 1), seed, **options))
    # The damage tells, and not in each file.
    assert outcome.refused > 0 or readable.forgiving
    assert outcome.read > 0


@pytest.mark.parametrize("kind", KINDS)
def test_some_damaged_files(tmp_path, kind):
    read_damaged(kind, tmp_path, 30, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files(tmp_path, kind):
    read_damaged(kind, tmp_path, 500, seed=2)
