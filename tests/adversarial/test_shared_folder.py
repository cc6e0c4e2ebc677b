"""Several processes, one folder: one owns it and the others are told; who reads meanwhile finds it whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

VERBS, LOADS = (Path(__file__).with_name(name) for name in ("verbs.py", "loads.py"))


@pytest.mark.parametrize(
    "names, rounds",
    [("eval,view,convert,train", 1), pytest.param("eval,tune,train,view,convert,analyze", 10, marks=pytest.mark.slow)],
)
def test_verbs(tmp_path, names, rounds):
    found = subprocess.run(
        [sys.executable, str(VERBS), "shared", str(tmp_path), names, str(rounds)], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(rows) == len(names.split(",")) * rounds
    wrong = [row for row in rows if not sound(row)]
    assert not wrong, "\n".join(map(str, wrong))


def sound(row: dict) -> bool:
    """The owner has done it and the other was told whose the folder is; where there is no owner, both may have done it.
    Nothing lies about."""
    ends = [*zip(row["codes"], row["said"], strict=True)]
    refused = [said for code, said in ends if code == 2]
    told = all(said.startswith("saccade: ") for said in refused)
    codes = sorted(row["codes"])
    if row["owns"]:
        ended = codes == [0, 2] and "is being written by process" in refused[0]
    else:
        ended = codes in ([0, 0], [0, 2])
    return ended and told and not row["traceback"] and row["made"] and not row["rest"]


@pytest.mark.parametrize("loads, readers, writers", [(4, 1, 1), pytest.param(300, 3, 2, marks=pytest.mark.slow)])
def test_loads_during_saves(tmp_path, loads, readers, writers):
    """Writers replace the folder's model without a pause; every load is one of the two models, whole."""
    line = [sys.executable, str(LOADS), str(tmp_path / "m"), *map(str, (loads, readers, writers))]
    found = subprocess.run(line, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    counts = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(counts) == readers and all(sum(row.values()) == loads for row in counts)
