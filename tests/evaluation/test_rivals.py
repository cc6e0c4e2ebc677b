"""Other models beside the settings of one: measured alike, named in the verdict, never chosen."""

from __future__ import annotations

import json

import pytest
import torch

import saccade
from data_helpers import write_folder
from saccade.backbones.saving import save
from saccade.cli import main
from saccade.data import open_images
from saccade.errors import UserError
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.report import tune
from saccade.evaluation.rivals import open_rivals
from small_runs import QUICK, files, shorten, tiny


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("photos"), files()))


@pytest.fixture(scope="module")
def smaller(tmp_path_factory) -> str:
    """A folder with a smaller model, which takes smaller images."""
    folder = tmp_path_factory.mktemp("smaller") / "model"
    save(tiny(seed=1, depth=1, img_size=32), folder)
    return str(folder)


def test_a_rival_sees_the_images_as_it_was_made_for(photos, smaller):
    model = tiny()
    found = saccade.eval(model, photos, ["tome(r=2)"], rivals=[smaller])
    dense, _, row = found.rows
    assert row.setting == f"rival {smaller}" and row.metric == "top-1" and row.images == dense.images
    alone = saccade.eval(smaller, photos).rows[0]
    assert row.value == alone.value and row.gmacs == alone.gmacs
    assert row.agreement.mean < 1.0 and row.delta is not None and row.trained is None


def test_a_rival_stands_in_the_report_and_is_not_chosen(photos, smaller, tmp_path, monkeypatch):
    shorten(monkeypatch)
    found = tune(tiny(), photos, "1.2x", out=tmp_path / "out", rivals=[smaller], **QUICK)
    rows = [row for row in found.rows if row.family == "rival"]
    assert rows and not any(row.chosen or row.on_frontier for row in rows)
    assert all(row.speedup is not None and row.value is not None for row in rows)
    assert sum(f"`rival {smaller}" in line for line in found.recommendation) == 1
    assert f"rival {smaller}" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "frontier.json").read_text())["rows"][-1]["metric"] == "top-1"
    assert saccade.load(tmp_path / "out" / "model").vit.patch_embed.img_size == (64, 64)


def test_a_rival_that_cannot_be_compared_is_refused(photos, smaller):
    images = open_images(photos)

    def refused(model, rival, metric, said):
        (found,) = open_rivals([rival], model)
        with pytest.raises(UserError, match=said) as caught:
            found.check(Evaluator(model, images, metric=metric))
        assert "\n" not in str(caught.value)

    encoder = tiny(num_classes=0)
    refused(tiny(), tiny(num_classes=4), "agreement", "has 4 classes and the model 3")
    refused(tiny(), encoder, "kl", "has no classifier and the model 3")
    refused(tiny(), smaller, "cells", "space of its own, and cells compares cells.*top-1, agreement or kl fits")
    refused(encoder, smaller, "cosine", "space of its own, and cosine compares embeddings.*reindexed@10 or.*knn fits")
    refused(encoder, smaller, "recall@5", "reindexed@5")
    with pytest.raises(UserError, match="two rivals are called"):
        open_rivals([smaller, smaller], tiny())


@pytest.mark.parametrize("metric", ["knn", "reindexed@4"])
def test_an_encoder_is_compared_with_a_rival_of_another_width(photos, metric):
    encoder, rival = tiny(num_classes=0), tiny(seed=1, depth=1, embed_dim=24)  # its classifier is taken off
    found = saccade.eval(encoder, photos, ["tome(r=2)"], metric=metric, rivals=rival)  # or a list of them
    own = saccade.eval(encoder, photos, metric=metric).rows[0]
    assert found.rows[0].value == own.value and 0 < found.rows[-1].value.mean < 1.0
    assert rival.vit.num_classes == 3
    if metric == "knn":  # by its own index
        rival.vit.reset_classifier(0)
        assert found.rows[-1].value == saccade.eval(rival, photos, metric="knn").rows[0].value


def test_weights_of_a_rival_are_named_with_it(tmp_path):
    torch.manual_seed(0)
    vit = saccade.create_model("vit_tiny_patch16_224", num_classes=1000).vit
    import safetensors.torch

    safetensors.torch.save_file(vit.state_dict(), tmp_path / "w.safetensors")
    (found,) = open_rivals([f"vit_tiny_patch16_224={tmp_path / 'w.safetensors'}"], tiny())
    assert found.name == "rival vit_tiny_patch16_224"
    assert torch.equal(found.model.vit.head.weight, vit.head.weight)


@pytest.mark.parametrize("verb", ["eval", "tune"])
def test_the_weights_of_a_rival_are_not_written_over(verb, photos, tmp_path, capsys):
    (tmp_path / "out" / "model").mkdir(parents=True)
    weights = tmp_path / "out" / "model" / "w.safetensors"
    weights.write_bytes(b"mine")
    with pytest.raises(SystemExit):
        main([verb, "vit_tiny_patch16_224", str(photos), "--rival", f"x={weights}", "--out", str(tmp_path / "out")])
    assert "would write over" in capsys.readouterr().err and weights.read_bytes() == b"mine"
