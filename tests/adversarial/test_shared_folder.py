"""Two processes, one folder: each ends well or says so in a line, and what they leave is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("verbs.py")


@pytest.mark.parametrize(
    "names, rounds",
    [("eval,view,convert,train", 1), pytest.param("eval,tune,train,view,convert,analyze", 10, marks=pytest.mark.slow)],
)
def test_verbs(tmp_path, names, rounds):
    found = subprocess.run(
        [sys.executable, str(SCRIPT), "shared", str(tmp_path), names, str(rounds)], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(rows) == len(names.split(",")) * rounds
    wrong = [row for row in rows if not sound(row)]
    assert not wrong, "\n".join(map(str, wrong))


def sound(row: dict) -> bool:
    """One of them at least has done it, the other may have been told that the folder is taken; nothing lies about."""
    ends = zip(row["codes"], row["said"], strict=True)
    ended = all(code == 0 or (code == 2 and said.startswith("saccade: ")) for code, said in ends)
    return ended and 0 in row["codes"] and not row["traceback"] and row["made"] and not row["rest"]
