"""Text files that a user names are regular and of a bounded size before they are read; addresses are no folders."""

from __future__ import annotations

import os

import pytest

import saccade
from saccade.analysis.bias import read_table
from saccade.cli import main
from saccade.errors import UserError
from saccade.training.config import read_config

READERS = {
    "bias": lambda file: read_table(str(file), ["cat"], 1000),
    "config": lambda file: read_config(str(file)),
}


@pytest.fixture(params=["too long", "pipe", "deep"])
def odd(request, tmp_path):
    file = tmp_path / "x.toml"
    if request.param == "pipe":
        os.mkfifo(file)
    elif request.param == "deep":
        file.write_text("[" * 100_000)
    else:
        with open(file, "wb") as stream:
            stream.truncate(2**36)  # a hole: nothing on the disk, 64 GiB to a reader
    return file


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_none_is_refused_at_once(reader, odd):
    with pytest.raises(UserError) as refused:
        READERS[reader](odd)
    assert "x.toml" in str(refused.value) and "\n" not in str(refused.value)


def test_an_address_where_nothing_is(tmp_path, monkeypatch, capsys):
    name = "local-dir:/nowhere/model"
    monkeypatch.chdir(tmp_path)
    for verb in (saccade.create_model, saccade.bench, saccade.Predictor):
        with pytest.raises(UserError, match=r"/nowhere/model' has no config.json"):
            verb(name, pretrained=True)
    for command in (
        ["bench", name, "--pretrained"],
        ["convert", name, "--pretrained", "--patch", "8", "--out", "z"],
        ["view", name, "x.png", "--pretrained", "--out", "y.png"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(command)
        said = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and said.count("\n") == 0 and "has no config.json" in said, said


@pytest.mark.parametrize("network", ["vit_giant_patch14_224", "vit_large_patch16_224", "convnext_xlarge"])
def test_a_network_that_scores_is_bounded_before_it_is_made(network, tmp_path, monkeypatch):
    """From a setting, from a folder's and from the command line: all of it on the meta device."""
    import json

    import timm

    made, real = [], timm.create_model

    def create(*args, **kwargs):
        module = real(*args, **kwargs)
        made.append(next(module.parameters()).device.type)
        return module

    scorer = f"feature(network='{network}', stride={14 if 'giant' in network else 16}, weights='random')"
    setting = f'quadtree(7, scorer="{scorer}")'
    model = saccade.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=1, num_heads=3)
    model.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["saccade"]["setting"] = setting
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UserError, match=r"million parameters, limit 200"):
        model.at(setting)
    assert made and {*made} == {"meta"}
    with pytest.raises(UserError, match=r"million parameters, limit 200"):
        saccade.load(tmp_path / "m")
    with pytest.raises(SystemExit) as stop:
        main(["bench", "vit_tiny_patch16_224", "-s", setting, "--batch", "1", "--seconds", "0"])
    assert stop.value.code == 2
