"""``doctor`` names what is there and what is missing, with the line that installs it."""

from __future__ import annotations

import json

import pytest
import torch

from saccade.cli import main
from saccade.evaluation.doctor import doctor
from saccade.runners import engine


def test_what_is_here(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    assert not ended.value.code
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert f"torch {torch.__version__.split('+')[0]}" in rows["versions"]["found"]
    assert rows["threads"]["found"].startswith(f"{torch.get_num_threads()} of")
    assert "fp32" in rows["AOTInductor"]["found"]


def test_what_is_missing_has_its_install_line(monkeypatch):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    rows = {fact.what: fact for fact in doctor().rows}
    for name, extra in (("ONNX Runtime", "onnx"), ("OpenVINO", "openvino")):
        assert (rows[name].found, rows[name].advice) == ("not installed", f"pip install 'saccade[{extra}]'")
