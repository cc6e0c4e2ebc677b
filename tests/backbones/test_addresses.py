"""Models at timm's addresses: a folder or the hub, as timm itself writes them; only safetensors are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn

import saccade
from oracles import relative
from saccade.cli import main
from saccade.errors import UserError

SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
PATHOLOGY = {**SMALL, "mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "init_values": 1e-5,
             "no_embed_class": True, "reg_tokens": 4, "num_classes": 0}  # fmt: skip
NAMED = {"mlp_layer": "SwiGLUPacked", "act_layer": "nn.SiLU"}


def written(folder: Path, **args) -> nn.Module:
    """A ViT in a folder, by timm's own function."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **args).eval()
    told = {k: NAMED.get(k, v) for k, v in args.items()}
    names = {} if args["num_classes"] == 0 else {"label_names": [f"n{i}" for i in range(args["num_classes"])]}
    save_for_hf(vit, folder, model_config={"model_args": told, **names}, safe_serialization=True)
    return vit


@torch.no_grad()
@pytest.mark.parametrize("args", [{**SMALL, "num_classes": 5}, PATHOLOGY], ids=["classifier", "encoder"])
def test_what_timm_wrote_is_opened_and_kept(tmp_path, args):
    vit = written(tmp_path / "theirs", **args)
    model = saccade.create_model(f"local-dir:{tmp_path / 'theirs'}", "tome(r=2)", pretrained=True)
    images = torch.randn(2, 3, 64, 64)
    assert relative(model.at("dense")(images).logits, vit(images)) <= 1e-5
    assert model.class_names == (tuple(f"n{i}" for i in range(5)) if args["num_classes"] else None)
    model.save(tmp_path / "ours")
    assert torch.equal(saccade.load(tmp_path / "ours")(images).logits, model(images).logits)


def test_an_address_in_the_place_of_a_name(tmp_path, capsys):
    written(tmp_path / "theirs", **SMALL, num_classes=5)
    address = f"local-dir:{tmp_path / 'theirs'}"
    with pytest.raises(SystemExit) as stop:
        main(["bench", address, "-s", "tome(r=2)", "--batch", "1", "--seconds", "0"])
    assert stop.value.code in (0, None) and "tome(r=2)" in capsys.readouterr().out
    with pytest.raises(UserError, match="would have random weights"):
        saccade.Predictor(address)
    assert saccade.Predictor(address, pretrained=True).model.vit.num_classes == 5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architecture": "vit_none"}, "timm .* has no model 'vit_none'"),
        ({"architecture": "resnet18"}, "ResNet"),
        ({"model_args": {"depth": 10**9}}, "model_args.depth"),
        ({"model_args": {"act_layer": "os.system"}}, "model_args.act_layer"),
        ({"architecture": "local-dir:/etc"}, "is an address and not the name of an architecture"),
        ({"model_args": {**SMALL, "depth": 3}}, "missing"),
    ],
)
def test_a_config_that_is_none(tmp_path, change, match):
    written(tmp_path / "theirs", **SMALL, num_classes=5)
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=match) as refused:
        saccade.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True)
    assert "\n" not in str(refused.value)


def test_only_safetensors_are_read(tmp_path):
    vit = written(tmp_path / "theirs", **SMALL, num_classes=5)
    (tmp_path / "theirs" / "model.safetensors").unlink()
    torch.save(vit.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model.safetensors"):
        saccade.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True)


def test_the_hub(tmp_path, monkeypatch):
    """Two files are asked for, by name, of the revision that is named; what goes wrong is told in a line."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    written(tmp_path / "theirs", **SMALL, num_classes=5)
    asked = []

    def download(place, name, revision=None):
        asked.append((place, name, revision))
        return shutil.copy(tmp_path / "theirs" / name, tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = saccade.create_model("hf-hub:owner/name@v2", pretrained=True)
    assert asked == [("owner/name", "config.json", "v2"), ("owner/name", "model.safetensors", "v2")]
    state = load_file(tmp_path / "theirs" / "model.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in model.vit.state_dict().items())

    for error, match in (
        (LocalEntryNotFoundError("no"), "the hub cannot be reached"),
        (EntryNotFoundError("no"), "it is not there"),
        (RuntimeError("first\nsecond"), "RuntimeError: first"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
        with pytest.raises(UserError, match=match) as refused:
            saccade.create_model("hf_hub:owner/name", pretrained=True)
        assert "\n" not in str(refused.value)


def test_a_folder_is_told_from_a_name(tmp_path):
    with pytest.raises(UserError, match="there is a folder of that name here: local-dir:/"):
        saccade.create_model(f"hf-hub:{tmp_path}", pretrained=True)
    with pytest.raises(UserError, match=r"is a folder: saccade\.load opens what Saccade saved"):
        saccade.create_model(str(tmp_path))


def test_a_head_of_another_size_is_named_with_its_own_and_none_leaves_it_out(tmp_path):
    shape = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32}
    saved = saccade.create_model("vit_tiny_patch16_224", num_classes=7, **shape)
    save_file(saved.vit.state_dict(), tmp_path / "w.safetensors")
    name, shape["weights"] = "vit_tiny_patch16_224", tmp_path / "w.safetensors"
    with pytest.raises(UserError, match=r"its head has 7 classes: .* num_classes=7 \(--num-classes 7\), or with 0"):
        saccade.create_model(name, **shape)
    encoder, images = saccade.create_model(name, num_classes=0, **shape), torch.rand(2, 3, 32, 32)
    features = saved.forward_head(saved.forward_features(images), pre_logits=True)
    assert torch.allclose(encoder(images).logits, features, atol=1e-6)


def test_a_folder_that_was_saved_under_a_setting_says_what_an_address_leaves_behind(tmp_path, recwarn):
    model = saccade.create_model("vit_tiny_patch16_224", **SMALL, num_classes=5)
    model.save(tmp_path / "plain")
    assert not saccade.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).setting.calls and not recwarn
    model.at("tome(r=2)").save(tmp_path / "merging")
    with pytest.warns(UserWarning, match=r"'tome\(r=2\)', and this opens its plain ViT: saccade.load opens it whole"):
        saccade.create_model(f"local-dir:{tmp_path / 'merging'}", pretrained=True)
