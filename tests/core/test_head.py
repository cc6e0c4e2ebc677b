"""Heads: any module that says what it reads of a model ends one, under all settings; what folders hold of it stays."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import saccade
from oracles import make_vit
from saccade.errors import UserError
from saccade.tasks.detection.detector import DetectionHead, Heads
from saccade.tasks.image_text.text_tower import TextTower
from saccade.tasks.image_text.two_tower import Space, TwoTowerHead
from saccade.tasks.segmentation.segmentation_heads import LinearHead
from saccade.tasks.segmentation.segmenter import SegmentationHead
from saccade.training.multi_setting import MultiSettingModel

TEXTS = {"kind": "bytes", "out": 8, "width": 8, "depth": 1, "heads": 1, "length": 20}


def texts() -> TextTower:
    return TextTower(8, width=8, depth=1, heads=1, length=20)


HEADS = {  # a head, the name that its weights have in a folder, and what config.json says of it
    "segment": (
        lambda: SegmentationHead(LinearHead(96, 2), ("road", "sky"), void=9),
        "decoder",
        {"decoder": {"kind": "linear", "classes": 2}, "classes": ["road", "sky"], "void": 9},
    ),
    "detect": (
        lambda: DetectionHead(Heads(texts(), 96, ["cup", "dog"])),
        "heads",
        {"queries": TEXTS, "names": ["cup", "dog"]},
    ),
    "textimage": (
        lambda: TwoTowerHead(Space(texts(), 96, project=True)),
        "space",
        {"texts": TEXTS, "project": True, "loss": "sigmoid"},
    ),
}


def ended(task: str, setting: str = "", seed: int = 0) -> saccade.AdaptiveViT:
    torch.manual_seed(seed)
    vit = make_vit(seed=seed, img_size=(32, 48), patch_size=8)
    return saccade.AdaptiveViT(vit, setting).with_head(HEADS[task][0]()).eval()


def answer(model: saccade.AdaptiveViT, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(images)
    return out.embedding if hasattr(out, "embedding") else out.logits


class Brightness(saccade.Head):
    """A user's own: how bright the dense map is, times what it learns."""

    task, noun, verb, config = "brightness", "light meter", "shine", "light"

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, model, images, *, gamma: float = 1.0):
        features, tokens, trace = model.features(images)
        return saccade.Output(self.gain * gamma * features.flatten(1).mean(1, keepdim=True), tokens, trace)

    def describe(self):
        return {"unit": "lux"}

    @classmethod
    def rebuild(cls, vit, described):
        assert described["unit"] == "lux"
        return cls()


def test_a_head_from_elsewhere_ends_a_model_under_every_setting():
    model = saccade.AdaptiveViT(make_vit(), "grid(16)").eval()
    images = torch.randn(2, 3, *model.input_size())
    lit = model.with_head(Brightness())
    assert lit.vit is model.vit and lit.vit.num_classes == 0 and lit.class_names is None
    for setting in ("", "tome(r=2)", "evit(0.7)"):
        view = lit.at(setting)
        assert view.task_head is lit.task_head and not lit.training
        with torch.no_grad():
            mean = view.feature_map(images).mean((1, 2, 3))
            assert torch.allclose(view(images).logits[:, 0], mean, atol=1e-6)
            assert torch.equal(view(images, gamma=2.0).logits, 2 * view(images).logits)
    lit.train()
    assert lit.task_head.training
    assert "task_head.gain" in dict(lit.named_parameters())


def test_a_head_from_elsewhere_is_loaded_once_it_is_imported(tmp_path):
    lit = saccade.AdaptiveViT(make_vit()).with_head(Brightness())
    nn.init.constant_(lit.task_head.gain, 3.0)
    lit.save(tmp_path / "m")
    assert saccade.load(tmp_path / "m").task_head.gain.item() == 3.0
    file = tmp_path / "m" / "config.json"
    file.write_text(file.read_text().replace('"brightness"', '"darkness"'))
    with pytest.raises(UserError, match="is for task 'darkness'; this version knows classify, segment, detect"):
        saccade.load(tmp_path / "m")


def test_a_head_has_to_fit():
    plain = saccade.AdaptiveViT(make_vit())
    with pytest.raises(UserError, match="still has a classifier of"):
        saccade.AdaptiveViT(plain.vit, head=Brightness())
    with pytest.raises(UserError, match="this model holds no light meter: train one with `saccade train light`"):
        Brightness.of(plain)
    with pytest.raises(UserError, match="width 96 and its heads 32"):
        plain.with_head(DetectionHead(Heads(texts(), 32, ["cup"])))
    with pytest.raises(TypeError):
        saccade.AdaptiveViT(make_vit())(torch.zeros(1, 3, 32, 48), torch.zeros(1))  # the ViT's own takes images alone


@pytest.mark.parametrize("task", HEADS)
def test_folders_are_what_they_were(task, tmp_path):
    """Names of weights and keys of config.json are those of version 0.1's first folders."""
    model = ended(task, "grid(8) | tome(r=2)")
    model.save(tmp_path / "m")
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"vit", HEADS[task][1]}  # noqa: SIM118
    facts = json.loads((tmp_path / "m" / "config.json").read_text())["saccade"]
    assert facts.pop("weights")
    assert facts == {"format": 1, "setting": "grid(8) | tome(r=2)", "task": task, **HEADS[task][2]}
    again = saccade.load(tmp_path / "m")
    images = torch.randn(2, 3, 32, 48)
    assert type(again.task_head) is type(model.task_head) and not again.training
    assert torch.equal(answer(again, images), answer(model, images))


@pytest.mark.parametrize("task", HEADS)
def test_state_dicts_of_before_load(task):
    """Then a head's parts stood beside the ViT; of runs that are resumed too, averaged weights included."""
    model, other, images = ended(task), ended(task, seed=1), torch.randn(2, 3, 32, 48)
    assert not torch.equal(answer(other, images), answer(model, images))
    before = {name.removeprefix("task_head."): value for name, value in model.state_dict().items()}
    assert any(name.startswith(HEADS[task][1]) for name in before)
    other.load_state_dict(before)
    assert torch.equal(answer(other, images), answer(model, images))
    students = [MultiSettingModel(ended(task, seed=seed), ["dense", "grid(16)"]) for seed in range(2)]
    before = {name.removeprefix("task_head."): value for name, value in students[0].state_dict().items()}
    averaged = torch.optim.swa_utils.AveragedModel(students[1])
    averaged.load_state_dict({f"module.{k}": v for k, v in before.items()} | {"n_averaged": torch.tensor(1)})
    assert torch.equal(answer(averaged.module.views[1], images), answer(students[0].views[1], images))
