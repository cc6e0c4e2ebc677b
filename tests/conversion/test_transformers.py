"""Models of transformers: exact as timm's, from the library's own modules and from files without it, and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import saccade
from oracles import make_vit
from saccade.errors import UserError
from saccade.model import AdaptiveViT

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96,
         "image_size": 32, "patch_size": 8, "num_labels": 5}  # fmt: skip
# (config, model, what else it is configured with, what it gives that ours gives too)
THEIRS = [
    ("ViTConfig", "ViTForImageClassification", {}, "logits"),
    ("ViTConfig", "ViTModel", {"qkv_bias": False}, "class token"),
    ("DeiTConfig", "DeiTForImageClassification", {}, "logits"),
    ("DeiTConfig", "DeiTForImageClassificationWithTeacher", {}, "logits"),
    ("Dinov2Config", "Dinov2Model", {}, "pooler_output"),
    ("Dinov2Config", "Dinov2Model", {"use_swiglu_ffn": True}, "pooler_output"),
    ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {}, "pooler_output"),
    ("DINOv3ViTConfig", "DINOv3ViTModel", {"num_register_tokens": 4}, "pooler_output"),
    ("DINOv3ViTConfig", "DINOv3ViTModel", {"query_bias": False, "value_bias": False}, "pooler_output"),
    ("DINOv3ViTConfig", "DINOv3ViTModel", {"use_gated_mlp": True, "hidden_act": "silu"}, "pooler_output"),
    ("CLIPVisionConfig", "CLIPVisionModel", {}, "pooler_output"),
    ("CLIPVisionConfig", "CLIPVisionModelWithProjection", {"projection_dim": 7}, "image_embeds"),
    ("SiglipVisionConfig", "SiglipVisionModel", {}, "pooler_output"),
    ("SiglipVisionConfig", "SiglipVisionModel", {"hidden_act": "gelu"}, "pooler_output"),
    ("Siglip2VisionConfig", "Siglip2VisionModel", {"num_patches": 16}, "pooler_output"),
    ("IJepaConfig", "IJepaModel", {}, "mean"),
    ("IJepaConfig", "IJepaForImageClassification", {}, "logits"),
]
ids = [f"{model}{'-' if more else ''}{'-'.join(more)}" for _, model, more, _ in THEIRS]


def theirs(config: str, model: str, more: dict) -> nn.Module:
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    made = getattr(library, model)(getattr(library, config)(**SMALL | more)).eval()
    for weight in made.parameters():  # as they start, positions are zero and features near it
        nn.init.normal_(weight, 0.0, 0.3 if weight.ndim == 1 else 0.15)
    return made


def said(model: nn.Module, images: Tensor, what: str) -> Tensor:
    if type(model).__name__ == "Siglip2VisionModel":  # patches, their channels last
        patches = images.unflatten(2, (4, 8)).unflatten(4, (4, 8)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        found = model(patches.flatten(2), torch.ones(2, 16, dtype=torch.long), torch.tensor([[4, 4]] * 2))
    else:
        found = model(images)
    tokens = {"class token": lambda x: x[:, 0], "mean": lambda x: x.mean(1)}
    return tokens[what](found.last_hidden_state) if what in tokens else found[what]


@torch.no_grad()
@pytest.mark.parametrize(("config", "model", "more", "what"), THEIRS, ids=ids)
def test_equal_to_theirs_as_a_module_a_folder_and_after_saving(config, model, more, what, tmp_path):
    made, images = theirs(config, model, more), torch.randn(2, 3, 32, 32)
    expected = said(made, images, what)
    ours = saccade.from_transformers(made)
    assert expected.abs().max() > 0.1 and (ours(images).logits - expected).abs().max() <= 1e-5
    made.save_pretrained(tmp_path / "theirs")
    found = saccade.from_transformers(tmp_path / "theirs", "tome(r=2)")
    assert torch.equal(found.at("dense")(images).logits, ours(images).logits)
    found.save(tmp_path / "ours")
    again = saccade.load(tmp_path / "ours")
    assert str(again.setting) == "tome(r=2)" and torch.equal(again(images).logits, found(images).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "model", "name"),
    [("CLIPConfig", "CLIPModel", "pooler_output"), ("SiglipConfig", "SiglipModel", "pooler_output")],
)
def test_the_vision_tower_of_a_pair(config, model, name, tmp_path):
    library = pytest.importorskip("transformers")
    text = {k: v for k, v in SMALL.items() if "size" not in k or k in ("hidden_size", "intermediate_size")}
    both = getattr(library, config)(text_config={**text, "vocab_size": 50}, vision_config=SMALL, projection_dim=7)
    made, images = getattr(library, model)(both).eval(), torch.randn(2, 3, 32, 32)
    made.save_pretrained(tmp_path / "theirs")  # where the tower's config says only what is not usual
    expected = made.get_image_features(images)[name]
    assert (saccade.from_transformers(tmp_path / "theirs")(images).logits - expected).abs().max() <= 1e-5
    patched = saccade.patch_transformers(made, "dense").get_image_features(images)[name]
    assert (patched - expected).abs().max() <= 1e-5


PATCHABLE = [case for case in THEIRS if case[1] != "Siglip2VisionModel"]


@torch.no_grad()
@pytest.mark.parametrize(("config", "model", "more", "what"), PATCHABLE, ids=[i for i in ids if "Siglip2" not in i])
def test_patched_it_gives_its_own_output_class(config, model, more, what):
    made, images = theirs(config, model, more), torch.randn(2, 3, 32, 32)
    before, names = made(images), [*made.state_dict()]
    assert saccade.patch_transformers(made, "dense") is made
    for key, value in made(images).items():
        assert value.shape == before[key].shape and (value - before[key]).abs().max() <= 1e-5, key
    assert type(made(images)) is type(before) and [*made.state_dict()] == names
    tuple_before, tuple_after = saccade.unpatch_transformers(made)(images, return_dict=False), before.to_tuple()
    assert all(torch.equal(a, b) for a, b in zip(tuple_before, tuple_after, strict=True))
    reduced = saccade.patch_transformers(saccade.patch_transformers(made, "dense"), "tome(r=4)")(images)
    assert all(value.shape == before[key].shape for key, value in reduced.items())
    found = saccade.from_transformers(made, "tome(r=4)")(images).logits
    assert (said(made, images, what) - found).abs().max() <= 1e-5  # a mean over all patches weighs by size, too
    assert (found - said(saccade.unpatch_transformers(made), images, what)).abs().max() > 1e-3


@torch.no_grad()
def test_their_pipeline_gets_a_setting_by_one_line():
    library = pytest.importorskip("transformers")
    made = theirs("ViTConfig", "ViTForImageClassification", {})
    processor = library.ViTImageProcessor(size={"height": 32, "width": 32})
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))

    def scores(model: nn.Module) -> dict[str, float]:
        pipe = library.pipeline("image-classification", model=model, image_processor=processor)
        return {row["label"]: row["score"] for row in pipe(photo, top_k=5)}

    before = scores(made)
    assert scores(saccade.patch_transformers(made, "dense")) == pytest.approx(before, abs=1e-5)
    assert scores(saccade.patch_transformers(made, "evit(0.5)")) != pytest.approx(before, abs=1e-4)
    model = saccade.from_transformers(made, processor=processor)
    predicted = saccade.Predictor(model)(photo)[0]
    assert max(float(p) for p in predicted.probabilities) == pytest.approx(
        max(before.values()), abs=0.02
    )  # two resizes of one photo


@torch.no_grad()
def test_patched_it_follows_to_another_number_type():
    made = saccade.patch_transformers(theirs("Dinov2Config", "Dinov2Model", {}), "tome(r=2)").to(torch.bfloat16)
    assert made(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)).pooler_output.dtype == torch.bfloat16
    with pytest.raises(UserError, match="unpatch_transformers"):
        made(torch.randn(2, 3, 32, 32), output_hidden_states=True)


def test_what_has_no_form_here_is_refused():
    library = pytest.importorskip("transformers")
    with pytest.raises(UserError, match=r"reads class token and mean together.*classifier=False"):
        saccade.from_transformers(made := theirs("Dinov2Config", "Dinov2ForImageClassification", {}))
    assert saccade.from_transformers(made, classifier=False).vit.num_classes == 0
    with pytest.raises(UserError, match="reads the mean before the last norm"):
        config = library.CLIPConfig(vision_config=SMALL, num_labels=5)
        saccade.from_transformers(library.CLIPForImageClassification(config))
    for odd in ({"rope_theta": 50.0}, {"key_bias": True}):
        with pytest.raises(UserError, match=r"rope_theta=50|biases of keys"):
            saccade.from_transformers(library.DINOv3ViTModel(library.DINOv3ViTConfig(**SMALL | odd)))
    with pytest.raises(UserError, match="decoder"):
        saccade.from_transformers(theirs("ViTConfig", "ViTForMaskedImageModeling", {"encoder_stride": 8}))
    with pytest.raises(UserError, match="no config of transformers"):
        saccade.from_transformers(nn.Linear(2, 2))
    with pytest.raises(UserError, match="no vision tower"):
        saccade.patch_transformers(nn.Linear(2, 2), "dense")


# Files, without the library: as transformers 4 names the weights, and as most on the hub are.
OLD = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
       "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}  # fmt: skip
OLD_TOP = {"cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings",
           "patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm",
           "head": "classifier"}  # fmt: skip


def old_names(vit: nn.Module) -> dict[str, Tensor]:
    """A timm ViT's weights by the names of transformers 4."""
    found = {}
    for name, value in vit.state_dict().items():
        base, _, end = name.rpartition(".") if name.endswith(("weight", "bias")) else (name, "", "")
        if base.startswith("blocks."):
            _, number, inside = base.split(".", 2)
            stem = f"vit.encoder.layer.{number}"
            if inside == "attn.qkv":
                for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    found[f"{stem}.attention.attention.{part}.{end}"] = rows.clone()
                continue
            found[f"{stem}.{OLD[inside]}.{end}"] = value
        else:
            found[OLD_TOP[base] + (f".{end}" if end else "")] = value
    return found


def hub_folder(folder: Path, vit: nn.Module, **more) -> Path:
    block = vit.blocks[0]
    config = {
        "model_type": "vit", "hidden_size": vit.embed_dim, "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads, "image_size": vit.patch_embed.img_size[0],
        "patch_size": vit.patch_embed.patch_size[0], "layer_norm_eps": 1e-6, "hidden_act": "gelu",
        "id2label": {str(i): f"thing {i}" for i in range(vit.num_classes)}, "transformers_version": "4.13.0", **more,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(old_names(vit), folder / "model.safetensors")
    return folder


@torch.no_grad()
def test_files_of_transformers_4_need_no_library(tmp_path):
    vit = make_vit("vit").eval()
    folder, size = hub_folder(tmp_path / "theirs", vit), vit.patch_embed.img_size[0]
    (folder / "preprocessor_config.json").write_text(json.dumps(
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True,
         "resample": 3, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}))  # fmt: skip
    images = torch.randn(2, 3, size, size)
    model = saccade.create_model(f"local-dir:{folder}", "tome(r=2)", pretrained=True)  # as every verb does
    assert torch.equal(model(images).logits, AdaptiveViT(vit, "tome(r=2)")(images).logits)
    assert model.class_names == tuple(f"thing {i}" for i in range(vit.num_classes))
    cfg = model.vit.pretrained_cfg
    assert (cfg["mean"], cfg["interpolation"], cfg["crop_pct"]) == ([0.1, 0.2, 0.3], "bicubic", 0.8)
    assert saccade.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).vit.num_classes == 0
    with pytest.raises(UserError, match="give pretrained=True"):
        saccade.create_model(f"local-dir:{folder}")
    with pytest.raises(UserError, match=r"without img_size=64: sizes are for the setting"):
        saccade.create_model(f"local-dir:{folder}", pretrained=True, img_size=64)


@torch.no_grad()
def test_weights_in_several_files(tmp_path):
    vit = make_vit("vit").eval()
    folder, state = hub_folder(tmp_path / "theirs", vit), old_names(vit)
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in halves.items() for name in part}}))
    found = saccade.from_transformers(folder).vit.state_dict()
    assert all(torch.equal(value, vit.state_dict()[name]) for name, value in found.items())
    index.write_text(json.dumps({"weight_map": {names[0]: "../secret.safetensors"}}))
    with pytest.raises(UserError, match="names no files beside it"):
        saccade.from_transformers(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"num_hidden_layers": 4}, "missing"),
        ({"hidden_act": "os.system"}, "hidden_act"),
        ({"model_type": "swin"}, "those with a form in timm are vit, deit"),
        ({"model_type": ["vit"]}, "cannot be used"),
        ({"patch_size": 4}, "of another shape"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path, change, match):
    folder = hub_folder(tmp_path / "theirs", make_vit("vit"), **change)
    with pytest.raises(UserError, match=match) as refused:
        saccade.from_transformers(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", sorted(old_names(make_vit("vit"))))
@pytest.mark.parametrize("put", [torch.tensor(1.0), torch.zeros(0), torch.zeros(2, 0, 3), torch.ones(2).to(torch.int8)],
                         ids=["scalar", "empty", "no rows", "codes"])  # fmt: skip
def test_tensors_that_are_none_of_a_vit(tmp_path, name, put):
    vit = make_vit("vit")
    folder = hub_folder(tmp_path / "theirs", vit)
    save_file(old_names(vit) | {name: put}, folder / "model.safetensors")
    with pytest.raises(UserError) as refused:
        saccade.from_transformers(folder)
    assert "\n" not in str(refused.value)


def test_imagenet_by_its_descriptions(tmp_path):
    """Their names of ImageNet's classes are words; folders of images have synsets."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    words = {str(i): info.index_to_description(i) for i in range(1000)}
    vit = make_vit("vit")
    vit.reset_classifier(1000)
    model = saccade.from_transformers(hub_folder(tmp_path / "theirs", vit, id2label=words))
    assert model.class_names == tuple(info.label_names())
    placeholders = {str(i): f"LABEL_{i}" for i in range(1000)}
    assert saccade.from_transformers(hub_folder(tmp_path / "x", vit, id2label=placeholders)).class_names is None


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"size": {"height": 32, "width": 32}, "resample": 2}, ("bilinear", 1.0, "squash")),
        ({"size": 224}, ("bilinear", 1.0, "squash")),
        ({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True}, ("bilinear", 224 / 256, "center")),
        (None, ("bilinear", 1.0, "squash")),
    ],
)
def test_processors(said, expected):
    from saccade.backbones.image_processor import preprocessing

    found = preprocessing(said, "vit", "it")
    assert (found["interpolation"], found["crop_pct"], found["crop_mode"]) == expected
    assert found["mean"] == [0.5, 0.5, 0.5]
    with pytest.raises(UserError, match="scaled by"):
        preprocessing({"rescale_factor": 1 / 127.5}, "vit", "it")
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        preprocessing({"image_mean": "half"}, "vit", "it")
