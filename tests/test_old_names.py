"""Names of before: what people wrote for earlier versions still runs, and says what it is called now."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import warnings

import pytest
import torch

import saccade
from oracles import make_vit
from saccade.renamed.names import MODULES, NAMES


@pytest.mark.parametrize("old", sorted(MODULES))
def test_an_old_module_is_its_successor_and_warns(old):
    sys.modules.pop(f"saccade.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"saccade\.{old} is saccade\.{MODULES[old]} now"):
        module = importlib.import_module(f"saccade.{old}")
    new = importlib.import_module(f"saccade.{MODULES[old]}")
    names = [n for n, value in vars(new).items() if getattr(value, "__module__", "") == new.__name__ and n[0] != "_"]
    assert all(getattr(module, name) is getattr(new, name) for name in names)
    with pytest.raises(AttributeError, match="no 'no_such_name'"):
        _ = module.no_such_name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("old", sorted(NAMES))
def test_an_old_name_is_found_where_it_was(old):
    module, _, name = old.rpartition(".")
    home, _, new = NAMES[old].rpartition(".")
    found = getattr(importlib.import_module(f"saccade.{module}"), name)
    assert found is getattr(importlib.import_module(f"saccade.{home}"), new)


def test_old_methods_of_a_model_give_what_new_ones_give():
    vit = make_vit()
    model = saccade.AdaptiveViT(vit, "tome(r=2)").eval()
    images = torch.randn(2, 3, *model.input_size())
    with torch.inference_mode():
        with pytest.warns(DeprecationWarning, match="AdaptiveViT.dense is feature_map now"):
            assert torch.equal(model.dense(images), model.feature_map(images))
        with pytest.warns(DeprecationWarning, match="AdaptiveViT.encode is forward_tokens now"):
            tokens, _ = model.encode(images)
        with pytest.warns(DeprecationWarning, match="AdaptiveViT.head is forward_head now"):
            logits = model.head(tokens)
        assert torch.equal(logits, model.forward_head(tokens))


def test_the_old_name_of_a_row_s_value():
    from saccade.reports.rows import Row

    nothing = dict.fromkeys(field.name for field in dataclasses.fields(Row))
    with pytest.warns(DeprecationWarning, match="Row.top1 is value now"):
        assert Row(**nothing | {"value": 0.5}).top1 == 0.5


def test_new_names_do_not_warn():
    code = "import saccade, saccade.core.plan; [getattr(saccade, name) for name in saccade._HOME]"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:saccade", "-c", code], check=True, timeout=120)


def test_nothing_is_shadowed():
    """No old name is that of a module which is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not any(importlib.import_module(f"saccade.{old}").__spec__.origin for old in MODULES)


def task_models() -> dict[str, tuple[type, dict]]:
    """Names of before, their parts, and the heads that they are now."""
    from saccade.tasks.detection.detector import DetectionHead, Heads
    from saccade.tasks.image_text.text_tower import TextTower
    from saccade.tasks.image_text.two_tower import Space, TwoTowerHead
    from saccade.tasks.segmentation.segmentation_heads import LinearHead
    from saccade.tasks.segmentation.segmenter import SegmentationHead

    texts = TextTower(8, width=8, depth=1, heads=1)
    return {
        "segmentation.segmenter.Segmenter": (
            SegmentationHead,
            {"decoder": LinearHead(96, 2), "classes": ("a", "b"), "void": 9},
        ),
        "detection.detector.Detector": (DetectionHead, {"heads": Heads(texts, 96, ["cup", "dog"])}),
        "image_text.two_tower.TextImage": (TwoTowerHead, {"space": Space(texts, 96, project=True)}),
    }


@pytest.mark.parametrize("old", task_models())
def test_a_task_model_of_before_is_a_model_with_a_head(old):
    kind, parts = task_models()[old]
    module, _, name = old.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"{name} is saccade.renamed.task_models.{name} now"):
        former = getattr(importlib.import_module(f"saccade.tasks.{module}"), name)
    vit = make_vit()
    assert not isinstance(saccade.AdaptiveViT(vit), former)
    vit.reset_classifier(0)
    model = former(vit, "tome(r=2)", **parts).eval()
    assert isinstance(model, former) and type(model.task_head) is kind and str(model.setting) == "tome(r=2)"
    for part, value in parts.items():
        with pytest.warns(DeprecationWarning, match=f"AdaptiveViT.{part} is task_head.{part} now"):
            assert getattr(model.at("dense"), part) is value
        with pytest.warns(DeprecationWarning, match=f"AdaptiveViT.{part} is task_head.{part} now"):
            setattr(model, part, value)
    assert not parts.keys() & model.__dict__.keys() and not parts.keys() & model._modules.keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_task_models_were_asked_is_still_answered():
    models = {}
    for kind, parts in task_models().values():
        vit = make_vit()
        vit.reset_classifier(0)
        models[kind.__name__] = saccade.AdaptiveViT(vit, head=kind(**parts)).eval()
    detector, towers = models["DetectionHead"], models["TwoTowerHead"]
    images = torch.randn(1, 3, *detector.input_size())
    with torch.no_grad():
        queries = detector.ask(["sea horse"])
        assert torch.equal(queries, detector.task_head.ask(["sea horse"]))
        assert torch.equal(detector(images, queries=queries).logits, detector(images, queries).logits)
        assert torch.equal(towers.words(["a cup"]), towers.task_head.words(["a cup"]))
        assert towers.classes([["a cup", "the cup"], ["a dog"]]).shape == (2, 8)
    with pytest.raises(AttributeError, match="has no attribute 'words'"):
        _ = detector.words
