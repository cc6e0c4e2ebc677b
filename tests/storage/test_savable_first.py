"""Verbs that save a model at their end say at their beginning what no folder can hold."""

from __future__ import annotations

import pytest
import torch

import saccade
from data_helpers import write_folder
from saccade.cli import main
from saccade.errors import UserError
from saccade.training.task import Task
from small_runs import files, tiny


def hooked(model: saccade.AdaptiveViT) -> saccade.AdaptiveViT:
    model.vit.blocks[1].register_forward_hook(lambda module, args, out: out * 0.5)
    return model


def mixed(model: saccade.AdaptiveViT) -> saccade.AdaptiveViT:
    model.vit.norm.to(torch.float64)
    return model


def nameless(model: saccade.AdaptiveViT) -> saccade.AdaptiveViT:
    model.vit.pretrained_cfg = {k: v for k, v in model.vit.pretrained_cfg.items() if k != "architecture"}
    return model


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("photos"), files(each=8)))


@pytest.mark.parametrize(
    ("change", "said"),
    [(hooked, "cannot be rebuilt"), (mixed, "one number type"), (nameless, "does not know its timm")],
)
def test_python_verbs_refuse_before_any_work(change, said, photos, tmp_path, monkeypatch):
    def work(*args, **kwargs):
        raise AssertionError("work was begun")

    monkeypatch.setattr("saccade.evaluation.report.search", work)
    monkeypatch.setattr("saccade.backbones.freeze.freeze", work)
    monkeypatch.setattr(Task, "ready", work)
    model = change(tiny())
    for verb in (
        lambda: saccade.tune(model, photos, "2x", out=tmp_path / "out"),
        lambda: saccade.convert(model, 8, out=tmp_path / "out"),
        lambda: saccade.train("finetune", ["run.steps=1"], model=model, data=photos, out=tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=said):
            verb()
        assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("change", [hooked, mixed, nameless])
@pytest.mark.parametrize(
    "command",
    [
        ["calibrate", "m", "DATA", "-s", "dynamicvit(0.7)", "--gmacs", "0.01", "--out", "out"],
        ["stem", "m", "DATA", "--out", "out"],
    ],
)
def test_commands_refuse_before_any_work(change, command, photos, tmp_path, monkeypatch, capsys):
    def work(*args, **kwargs):
        raise AssertionError("work was begun")

    monkeypatch.chdir(tmp_path)
    for place in (
        "saccade.evaluation.calibrate.calibrate",
        "saccade.conversion.stem_fit.read_images",
        "saccade.conversion.stem_fit.fit_stem",
    ):
        monkeypatch.setattr(place, work)
    monkeypatch.setattr(f"saccade.cli.{command[0]}.open_model", lambda *args, **kwargs: change(tiny()))
    with pytest.raises(SystemExit) as stop:
        main([part.replace("DATA", photos) for part in command])
    assert stop.value.code == 2 and capsys.readouterr().err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()
