"""A disk of 20 MB that fills up under every verb that writes: one line, nothing half written, and then again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("verbs.py")
ALL = "eval,view,convert,train,tune,analyze"
MOUNT = "mount -t tmpfs -o size=20m tmpfs {disk}"


def in_small_disk(tmp_path: Path, command: list[str]) -> subprocess.CompletedProcess:
    """Run a command where ``tmp_path / "disk"`` is a file system of 20 MB. Skips where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = MOUNT.format(disk=disk)
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here without privileges")
    return subprocess.run(
        [*inside, f'{mount} && exec "$@"', "sh", *command], capture_output=True, text=True, env=os.environ
    )


@pytest.mark.parametrize(
    "names, sizes",
    [
        ("eval,view,convert,train,tune", "0 60000"),
        pytest.param(
            "eval,view,convert,train,tune,analyze", "0 4096 20000 60000 200000 400000", marks=pytest.mark.slow
        ),
    ],
)
def test_verbs(tmp_path, names, sizes):
    (tmp_path / "root").mkdir()
    script = [sys.executable, str(SCRIPT), "full", str(tmp_path / "root"), names, str(tmp_path / "disk")]
    found = in_small_disk(tmp_path, [*script, *sizes.split()])
    assert found.returncode == 0, found.stderr
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(rows) == len(names.split(",")) * len(sizes.split())
    wrong = [row for row in rows if not sound(row)]
    assert not wrong, "\n".join(map(str, wrong))
    assert {row["code"] for row in rows if row["left"] == 0} == {2}, "a full disk was not noticed"


def sound(row: dict) -> bool:
    """It worked, or said why in one line; nothing unfinished lies about, and what was there is there still; with room
    the same command goes through."""
    ended = row["code"] == 0 or (row["code"] == 2 and row["said"].startswith("saccade: "))
    return ended and not row["traceback"] and not row["rest"] and row["intact"] and row["again"] == 0 and row["made"]
