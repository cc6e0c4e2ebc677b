"""Ended at every point at which it touches files, work leaves the old or the new behind; and it can go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from crash_works import WORKS

FEW = 1  # points of each work, the ways to end in turn
BRIEF = [work for work in WORKS if work != "convert"]  # it saves as "save_over" does


def crash(works: list[str], folder: Path, *most: int) -> list[dict]:
    script = Path(__file__).parents[1] / "crashes.py"
    line = [sys.executable, script, ",".join(works), folder, *map(str, most)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["work"] for row in found] == works
    return found


def test_some_points_of_every_work(tmp_path):
    for row in crash(BRIEF, tmp_path, FEW):
        assert row["points"] >= 5 and row["tried"] >= FEW, row


@pytest.mark.slow
@pytest.mark.parametrize("work", WORKS)
def test_every_point(work, tmp_path):
    (row,) = crash([work], tmp_path)
    assert row["tried"] == 3 * row["points"] >= 15, row
