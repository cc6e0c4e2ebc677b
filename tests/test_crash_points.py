"""Killed at every point at which it touches files, work leaves the old or the new behind; and it can go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def crash(work: str, folder: Path, *most: int) -> dict[str, int]:
    script = Path(__file__).with_name("crashes.py")
    done = subprocess.run([sys.executable, script, work, folder, *map(str, most)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("work", ["save_new", "save_over"])
def test_save_at_every_point(work, tmp_path):
    found = crash(work, tmp_path)
    assert found["points"] == found["tried"] >= 10, found
