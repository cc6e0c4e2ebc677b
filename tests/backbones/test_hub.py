"""Models to and from the hub, by huggingface_hub's own names; the hub is a folder here."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import ModelCard, ModelHubMixin

import saccade
from oracles import make_images, relative
from saccade.errors import UserError
from saccade.model import AdaptiveViT

KINDS = {
    "class token": {},
    "encoder": {"num_classes": 0, "reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5,
                "mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU},
    "map": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
}  # fmt: skip


def made(setting: str = "tome(r=2)", **args) -> AdaptiveViT:
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    return saccade.create_model("vit_tiny_patch16_224", setting, **small | args)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind, tmp_path):
    model, folder = made(**KINDS[kind]), tmp_path / "model"
    images = make_images(model.vit)
    assert isinstance(model, ModelHubMixin) and model.save_pretrained(folder) is None
    again = AdaptiveViT.from_pretrained(folder)
    assert str(again.setting) == "tome(r=2)" and torch.equal(again(images).logits, model(images).logits)
    other = AdaptiveViT.from_pretrained(folder, setting="tome(r=1)")
    assert torch.equal(other(images).logits, model.at("tome(r=1)")(images).logits)
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_card_opens_the_weights_without_saccade(kind, tmp_path, monkeypatch):
    model = made(**KINDS[kind])
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "saccade" and "tome" in card.data.tags
    code = [block for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL) if "import timm" in block]
    assert len(code) == 1 and "saccade" not in code[0]
    monkeypatch.chdir(tmp_path)
    known: dict = {}
    exec(compile(code[0], "README.md", "exec"), known)
    images = make_images(model.vit)
    assert relative(known["vit"].eval()(images), model.at("dense")(images).logits) <= 1e-6


def test_the_card_says_what_it_is_and_what_was_measured(tmp_path):
    model = made()
    told = {"setting": "topk(0.5) | tome(r=1)", "metric": "cosine", "value": 0.71234, "gmacs": 0.5, "speedup": 1.5}
    rows = [SimpleNamespace(**told, images_per_s=None)]
    model.save_pretrained(tmp_path, model_card_kwargs={"rows": rows, "license": "apache-2.0"})
    text = (tmp_path / "README.md").read_text()
    assert "`tome(r=2)`" in text and "32 × 32 pixels" in text and "license: apache-2.0" in text
    assert "| setting | cosine | gmacs |" in text
    assert "| topk(0.5) \\| tome(r=1) | 0.7123 | 0.5 |  | 1.5 |" in text
    macs = model(make_images(model.vit, 1), whole=True).trace.macs().item()
    assert f"| GMACs | {macs / 1e9:.3f}" in text
    (tmp_path / "README.md").write_text("mine")
    model.at("dense").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and str(saccade.load(tmp_path).setting) == "dense"


@torch.no_grad()
def test_to_the_hub_and_from_it(tmp_path, monkeypatch):
    """What is sent is what is saved; what is fetched are three files, by name."""
    from huggingface_hub import HfApi

    from saccade.backbones import hub

    hosted, asked = tmp_path / "hub", []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))

    def upload(self, *, repo_id, folder_path, **_):
        shutil.copytree(folder_path, hosted / repo_id)
        return f"https://there/{repo_id}"

    def download(name, allow_patterns, **how):
        asked.append((name, allow_patterns, how["revision"]))
        return str(hosted / name)

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(hub, "snapshot_download", download)
    model = made()
    assert model.push_to_hub("me/small") == "https://there/me/small"
    assert model.save_pretrained(tmp_path / "x", repo_id="me/other", push_to_hub=True) == "https://there/me/other"
    again = AdaptiveViT.from_pretrained("me/small", revision="v1")
    assert asked == [("me/small", ["config.json", "model.safetensors", "README.md"], "v1")]
    images = make_images(model.vit)
    assert torch.equal(again(images).logits, model(images).logits)


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"is not a model folder"):
        AdaptiveViT.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot fetch 'nobody/nothing' from the hub") as refused:
        AdaptiveViT.from_pretrained("nobody/nothing", local_files_only=True)
    assert "\n" not in str(refused.value)
    folder = Path(tmp_path / "photos")
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"not ours")
    with pytest.raises(UserError, match="folder of images"):
        made().save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["a.jpg"]
