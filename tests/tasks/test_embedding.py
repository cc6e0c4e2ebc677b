"""A model that ends in an embedding: what it gives, under every setting, in every verb that knows encoders."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

import saccade
from data_helpers import encode, picture, write_folder
from oracles import make_images, make_vit, relative
from saccade.backbones.freeze import freeze
from saccade.core.head import Head
from saccade.errors import UserError
from saccade.evaluation.prediction_cache import _digest
from saccade.model import AdaptiveViT
from saccade.runners.artefact import open_artefact
from saccade.tasks.embedding.embedding_head import EmbeddingHead

POOLS = {"own": "vit", "token": "class-average", "mean": "dinov2-registers", "map": "siglip"}
SETTINGS = ("dense", "tome(r=2)", "evit(0.5, score='received')", "ats(score='received')", "adavit(0.5)")


def ended(pool: str = "own", setting: str = "", **how) -> AdaptiveViT:
    vit = make_vit(POOLS[pool])
    return AdaptiveViT(vit, setting).with_head(EmbeddingHead(pool, **how)).eval()


@torch.no_grad()
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("normalise", [False, True])
def test_it_gives_what_embed_gives_under_every_setting(pool, normalise, tmp_path):
    model = ended(pool, normalise=normalise)
    images = make_images(model.vit)
    for setting in SETTINGS:
        try:
            view = model.at(setting).eval()
        except UserError:  # a score that this ViT has not
            continue
        out = view(images)
        assert out.logits.shape == (2, 96) and view.task_head is model.task_head
        assert relative(out.logits, view.embed(images, pool, normalise=normalise)) <= 1e-6, setting
        assert out.trace.macs().shape == (2,) and bool((out.trace.macs() > 0).all())
        view.save(tmp_path / setting.split("(")[0])
        again = saccade.load(tmp_path / setting.split("(")[0])
        assert torch.equal(again(images).logits, out.logits) and again.setting == view.setting
    assert (out.logits.norm(dim=1) - 1).abs().max() <= 1e-5 or not normalise


@torch.no_grad()
def test_a_mean_by_hand():
    """Of patches alone, each as often as patches were merged into it."""
    model = ended("mean", "tome(r=3)", normalise=True)
    images = make_images(model.vit)
    tokens, _ = model.forward_tokens(images)
    x = model.vit.norm(tokens.x)[:, model.vit.num_prefix_tokens :]
    sums = sum(size * row for size, row in zip(tokens.size[0], x[0], strict=True))
    assert relative(model(images).logits[0], sums / sums.norm()) <= 1e-5
    assert model.vit.num_prefix_tokens == 5 and tokens.size.max() > 1


def test_created_saved_as_pretrained_and_described(tmp_path):
    model = saccade.create_model("vit_tiny_patch16_224", "tome(r=2)", head="embedding", img_size=64, depth=2)
    assert model.num_classes == 0 and not model.training and model.task_head.pool == "own"
    head = saccade.EmbeddingHead("mean", normalise=True)
    model = saccade.create_model("vit_tiny_patch16_224", "tome(r=2)", head=head, img_size=64, depth=2)
    model.save_pretrained(tmp_path / "m")
    facts = json.loads((tmp_path / "m" / "config.json").read_text())["saccade"]
    assert (facts["task"], facts["pool"], facts["normalise"]) == ("embed", "mean", True)
    assert "image-feature-extraction" in (tmp_path / "m" / "README.md").read_text()
    images = torch.randn(2, 3, 64, 64)
    again = AdaptiveViT.from_pretrained(tmp_path / "m")
    assert repr(again.task_head) == "EmbeddingHead(pool='mean', normalise=True)"
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)
        assert torch.equal(again(images).square(), again(images).logits.square())  # the output stands for the vectors


def test_gradients_pass(tmp_path):
    model = ended("mean", "tome(r=2)").train()
    model(make_images(model.vit)).logits.square().sum().backward()
    assert model.vit.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    files = {f"{'ab'[i % 2]}/{i:02d}.png": encode(picture(70, 64, seed=i)) for i in range(12)}
    return str(write_folder(tmp_path_factory.mktemp("photos"), files))


@pytest.fixture(scope="module")
def encoder() -> AdaptiveViT:
    torch.manual_seed(0)
    how = {"img_size": 64, "depth": 2, "embed_dim": 96}
    return saccade.create_model("vit_tiny_patch16_224", "tome(r=2)", head=EmbeddingHead("mean", normalise=True), **how)


@torch.no_grad()
def test_predicted_and_evaluated(encoder, photos, tmp_path):
    found = saccade.predict(encoder, photos)
    vectors = torch.stack([torch.from_numpy(one.embedding) for one in found])
    crops = torch.stack([one.read() for one in found])
    images = saccade.Predictor(encoder).preprocess.normalise(crops)
    assert relative(vectors, encoder.embed(images, "mean", normalise=True)) <= 1e-5
    assert found[0].label is None and found[0].macs > 0
    encoder.save(tmp_path / "m")
    rows, _ = saccade.eval(str(tmp_path / "m"), photos, ["tome(r=2)", "random(0.3)"])
    assert rows[0].metric == "knn" and rows[0].agreement.mean == 1.0


@torch.no_grad()
@pytest.mark.slow
def test_exported_and_run_by_engines(encoder, photos, tmp_path):
    images, expected = torch.randn(3, 3, 64, 64), saccade.predict(encoder, photos)[0].embedding
    saccade.export(encoder, tmp_path / "out", runner="torch", data=photos)
    artefact = open_artefact(tmp_path / "out", trusted=True)
    assert artefact.config.outputs == ["embedding"] and artefact.config.parity.agreement is None
    assert relative(artefact(images).logits, encoder(images).logits) <= 1e-5
    (first, *_) = saccade.Predictor(artefact)(photos)
    assert relative(torch.from_numpy(first.embedding), torch.from_numpy(expected)) <= 1e-5
    assert relative(encoder.runner("torch")(images), encoder(images).logits) <= 1e-5


@torch.no_grad()
def test_deployed_it_ends_once_and_a_folder_says_how_it_runs(encoder, tmp_path):
    images = make_images(encoder.vit, 2, seed=1)
    own = AdaptiveViT(encoder.vit, "tome(r=2)", head=EmbeddingHead(normalise=False)).eval()
    for model in (encoder, own):
        fast = model.deploy("bf16")
        # rounded, another pair of tokens may be the most alike, which turns an embedding by some hundredths
        assert F.cosine_similarity(fast(images).logits, model(images).logits).min() > 0.95
        fast.save(tmp_path / "m")
        again = saccade.load(tmp_path / "m")
        assert str(again.deployed) == "bf16" and torch.equal(again(images).logits, fast(images).logits)


def test_other_ways_of_pooling_are_other_models_to_what_was_measured(encoder):
    other = encoder.with_head(EmbeddingHead("token"))
    assert _digest(encoder, ()) != _digest(other, ())


def test_what_cannot_be_is_refused_by_name(encoder, tmp_path, photos):
    with pytest.raises(UserError, match=r"head='embeddings' is neither 'embedding' nor a saccade\.Head"):
        saccade.create_model("vit_tiny_patch16_224", head="embeddings")
    with pytest.raises(UserError, match=r"pool='max', normalise='False': give one of own, token, mean, map"):
        EmbeddingHead("max")
    with pytest.raises(UserError, match="learned no pooling by attention"):
        ended().with_head(EmbeddingHead("map"))
    with pytest.raises(UserError, match="no class token"):
        ended("map").with_head(EmbeddingHead("token"))
    encoder.save(tmp_path / "m")
    with pytest.raises(UserError, match="a plain ViT has no embedding head"):
        freeze(encoder, "grid(16)")
    file = tmp_path / "m" / "config.json"
    file.write_text(file.read_text().replace('"pool": "mean"', '"pool": ["mean"]'))
    with pytest.raises(UserError, match="give one of own, token, mean, map"):
        saccade.load(tmp_path / "m")
    assert Head.written["embed"] is EmbeddingHead
    assert saccade.create_model("vit_tiny_patch16_224", depth=1, head="embedding").classifies
