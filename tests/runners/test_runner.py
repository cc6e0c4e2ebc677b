"""How a model is run: what is recorded is what runs, fp32 in and out, and the weights stay what they are."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import saccade
from saccade.checkpoint import CONFIG
from saccade.errors import UserError
from saccade.evaluation.speed import time_all, time_together
from saccade.runners.deployment import eager
from saccade.runners.runner import FP32, Runner
from small_runs import tiny

BF16 = Runner("bf16")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> saccade.AdaptiveViT:
    return tiny().at("evit(0.5)").eval()


def by_hand(model: saccade.AdaptiveViT, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The logits of a converted copy, which is how number types were always run."""
    made = copy.deepcopy(model).to(dtype)
    with torch.inference_mode():
        return made(images.to(dtype)).logits.float()


def logits(model: saccade.AdaptiveViT, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(images).logits


@pytest.fixture
def compiler(monkeypatch) -> list[str]:
    """``torch.compile`` with a backend that only counts graphs; what it was asked for."""
    graphs: list[str] = []
    real = torch.compile

    def backend(graph, inputs):
        graphs.append(str(inputs[0].dtype))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda module, **options: real(module, backend=backend, **options))
    torch._dynamo.reset()
    return graphs


@pytest.fixture
def no_compiler(monkeypatch) -> None:
    def broken(module, **options):
        def fail(*_):
            raise RuntimeError("no C++ compiler\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)


# What runs


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("setting", ["dense", "evit(0.5)", "grid(16, size=32) | tome(r=1)"])
def test_a_deployed_model_gives_the_logits_of_its_number_type(model, images, dtype, setting):
    view = model.at(setting).eval()
    images = images[..., : view.input_size()[0], : view.input_size()[1]]
    found = logits(view.deploy(dtype), images)
    assert found.dtype == torch.float32
    assert torch.equal(found, by_hand(view, images, Runner(dtype).model(view).vit.head.weight.dtype))
    assert not torch.equal(found, logits(view, images))
    assert next(eager(view.deploy(dtype)).parameters()).dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def test_load_gives_what_was_recorded_and_says_so(model, images, tmp_path):
    model.deploy(Runner("bf16", batch=8)).save(tmp_path / "m")
    loaded = saccade.load(tmp_path / "m")
    assert loaded.deployed == Runner("bf16", batch=8)
    assert torch.equal(logits(loaded, images), by_hand(model, images, torch.bfloat16))
    assert "runs in bf16 (fp32 in and out" in repr(loaded).split("(vit)")[0]
    assert "evit(0.5)" in repr(loaded).split("(vit)")[0]
    for plain in (None, "eager", "fp32", FP32):
        assert torch.equal(logits(saccade.load(tmp_path / "m", runner=plain), images), logits(model, images))
    assert torch.equal(
        logits(saccade.load(tmp_path / "m", "dense"), images), by_hand(model.at("dense"), images, torch.bfloat16)
    )
    assert saccade.load(tmp_path / "m", runner="fp16").deployed == Runner("fp16")


def test_the_weights_in_the_folder_stay_fp32_whatever_runs(model, images, tmp_path):
    model.deploy("bf16 compiled").save(tmp_path / "one")
    loaded = saccade.load(tmp_path / "one")
    loaded.save(tmp_path / "two")
    assert (tmp_path / "one" / CONFIG).read_text() == (tmp_path / "two" / CONFIG).read_text()
    again = saccade.load(tmp_path / "two", runner=None)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight) and weight.dtype == torch.float32
    assert torch.equal(logits(again, images), logits(model, images))


BATCHED = {"dtype": "bf16", "compiled": False, "batch": 3}
OLDER = [
    ("fp32", FP32),
    ("bf16", BF16),
    ("bf16 compiled", Runner("bf16", "compile")),
    (BATCHED, Runner("bf16", batch=3)),
]
WORDS = ["int4", "bf16 fp16", "bf16 compiled twice", "compiled eager", 3, ["bf16"]]
FIELDS = [
    {"dtype": "bf16", "more": 1},
    {"dtype": 3},
    {"compiled": "yes"},
    {"batch": 0},
    {"batch": 1e9},
    {"batch": True},
]


@pytest.mark.parametrize(("written", "expected"), [*OLDER, (None, None)])
def test_older_ways_of_writing_a_runner_are_read(model, tmp_path, written, expected):
    model.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / CONFIG).read_text())
    assert "runner" not in config["saccade"]
    config["saccade"]["runner"] = written
    (tmp_path / "m" / CONFIG).write_text(json.dumps(config))
    assert saccade.load(tmp_path / "m").deployed == expected


@pytest.mark.parametrize("written", [*WORDS, *FIELDS])
def test_what_is_no_runner_is_refused_in_one_line(model, tmp_path, written):
    with pytest.raises(UserError) as error:
        model.deploy(written)
    assert "\n" not in str(error.value)
    model.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / CONFIG).read_text())
    config["saccade"]["runner"] = written
    (tmp_path / "m" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json"):
        saccade.load(tmp_path / "m")


def test_what_does_not_classify_runs_as_it_is():
    from saccade.tasks.segmentation.segmenter import segmenter

    other = type("Other", (saccade.AdaptiveViT,), {"forward": lambda self, images: None})(tiny().vit)
    for model, name in ((other, "Other"), (segmenter(tiny(), ("a", "b"), "linear"), "segmentation model")):
        with pytest.raises(UserError, match=f"a {name} runs as it is"):
            model.deploy("bf16")
        assert model.deploy("eager").deployed == FP32


# Views, copies, training


def test_views_and_copies_run_the_same_way(model, images):
    deployed = model.deploy("bf16")
    assert deployed.at("dense").deployed == BF16
    assert torch.equal(logits(deployed.at("dense"), images), by_hand(model.at("dense"), images, torch.bfloat16))
    made = copy.deepcopy(deployed)
    assert made.deployed == BF16 and torch.equal(logits(made, images), logits(deployed, images))
    with torch.no_grad():
        made.vit.head.bias.add_(1)
    assert torch.equal(logits(deployed, images), by_hand(model, images, torch.bfloat16))
    again = pickle.loads(pickle.dumps(deployed._deployment))
    assert again.runner == BF16


def through_data(model: saccade.AdaptiveViT) -> None:
    """As some optimisers write, which torch does not count as a change: between ``train`` and ``eval``."""
    model.train()
    model.vit.head.bias.data.add_(1)
    model.eval()


def by_loading(model: saccade.AdaptiveViT) -> None:
    model.load_state_dict({k: v + 0.01 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def in_place(model: saccade.AdaptiveViT) -> None:
    nn.init.constant_(model.vit.head.bias, 3.0)


def by_other_memory(model: saccade.AdaptiveViT) -> None:
    model.vit.head.bias.data = model.vit.head.bias.detach() * 2 + 1


def by_a_hook(model: saccade.AdaptiveViT) -> None:
    model.vit.head.register_forward_hook(lambda module, inputs, out: out + 5)


def by_another_head(model: saccade.AdaptiveViT) -> None:
    torch.manual_seed(3)
    model.reset_classifier(3)


@pytest.mark.parametrize("change", [by_another_head, through_data, by_loading, in_place, by_other_memory, by_a_hook])
def test_changed_weights_and_hooks_are_noticed(model, images, change):
    deployed = model.deploy("bf16")
    before = logits(deployed, images)
    change(deployed)
    after = logits(deployed, images)
    assert not torch.equal(before, after)
    assert torch.equal(after, by_hand(model, images, torch.bfloat16))


def test_training_is_that_of_the_weights(model, images):
    deployed = model.deploy("bf16").train()
    found = deployed(images).logits
    found.sum().backward()
    assert deployed.vit.head.weight.grad is not None and found.dtype == torch.float32
    deployed.eval()
    with torch.no_grad():
        deployed.vit.head.weight.sub_(deployed.vit.head.weight.grad)
    assert torch.equal(logits(deployed, images), by_hand(model, images, torch.bfloat16))


def test_what_is_made_in_inference_mode_serves_other_modes(model, images):
    deployed = model.deploy("bf16")
    expected = logits(deployed, images)
    watched = images.clone().requires_grad_()
    out = deployed(watched).logits
    assert torch.equal(out.detach(), expected)
    out.sum().backward()
    assert watched.grad is not None
    assert all(not p.is_inference() for p in deployed.parameters())


def test_wrong_images_are_refused_as_ever(model):
    for runner in ("bf16", "bf16 compiled"):
        with pytest.raises(UserError, match="expected float"):
            model.deploy(runner)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


# Compiled


def test_compiled_batches_are_those_that_were_timed(model, images, compiler):
    deployed = model.deploy(Runner("bf16", "compile", 2))
    assert compiler == []  # nothing before the first call
    out = None
    with torch.inference_mode():
        for count in (2, 5, 4, 1, 3):
            out = deployed(images[:count])
            assert torch.allclose(out.logits, by_hand(model, images[:count], torch.bfloat16), atol=1e-2)
    assert compiler == ["torch.bfloat16"] * len(compiler) and len(compiler) >= 1
    first = len(compiler)
    with torch.inference_mode():
        deployed(images)
        deployed(images[:1])
    assert len(compiler) == first  # one graph for all batch sizes


def test_what_a_compiled_forward_does_not_give_is_run_when_it_is_read(model, images, compiler):
    plain = model.deploy("bf16")
    with torch.inference_mode():
        out, expected = model.deploy("bf16 compiled")(images), plain(images)
    assert "logits=(5, 3)" in repr(out)
    assert torch.equal(out.trace.macs(), expected.trace.macs()) and out.tokens.x.shape == expected.tokens.x.shape


def test_without_a_compiler_it_runs_all_the_same_and_says_so_once(model, images, no_compiler):
    deployed = model.deploy("bf16 compiled")
    with pytest.warns(RuntimeWarning, match="torch.compile does not work here.*no C\\+\\+ compiler"):
        found = logits(deployed, images)
    assert torch.equal(found, by_hand(model, images, torch.bfloat16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(deployed, images), found)


def test_what_does_not_compile_is_not_timed(model, no_compiler):
    entries = {"dense": model.at("dense").eval(), "c": model.deploy("bf16 compiled").at("dense").eval()}
    found = time_all(entries, 1, 0.0, least=1)
    assert [row.setting for row in found.rows] == ["dense"]
    assert found.failed["c"].startswith("torch.compile does not work here")
    with pytest.raises(UserError, match="leave it out"):
        time_together(entries, 1, 0.0)


def test_what_compiles_to_other_logits_is_not_timed(model, monkeypatch):
    class Wrong(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, images):
            return tuple(found.flip(-1) for found in self.module(images))

    monkeypatch.setattr(torch, "compile", lambda module, **options: Wrong(module))
    entries = {"dense": model.at("dense").eval(), "c": model.deploy("fp32 compiled").at("dense").eval()}
    found = time_all(entries, 2, 0.0, least=1)
    assert list(found.failed) == ["c"] and "gives other logits here" in found.failed["c"]


@pytest.mark.parametrize(
    ("runner", "setting", "share", "same"),
    [
        ("fp32 compiled", "evit(0.5)", 0.05, True),
        ("fp32 compiled", "evit(0.5)", 0.5, False),
        ("bf16 compiled", "dense", 0.5, False),
        ("bf16 compiled", "evit(0.5)", 0.5, True),  # rounding decides near ties, as it does in PyTorch
        ("bf16 compiled", "evit(0.5)", 2.0, False),
    ],
)
def test_logits_may_be_as_far_away_as_rounding_takes_them(model, monkeypatch, runner, setting, share, same):
    def away(module, **options):
        return lambda images: tuple(found * (1 + share) for found in module(images))

    monkeypatch.setattr(torch, "compile", away)
    entries = {"dense": model.at("dense").eval(), "c": model.at(setting).deploy(runner).eval()}
    found = time_all(entries, 2, 0.0, least=1)
    assert [*found.failed] == ([] if same else ["c"])
    assert same or f"{share:.1%} away" in found.failed["c"]


def test_the_timed_forward_is_the_deployed_one(model, monkeypatch):
    """Conversion of images and logits is in the time that is promised."""
    seen = []
    deployed = model.deploy("bf16")
    run = type(deployed._deployment).run

    def watched(self, view, images):
        seen.append((self.runner, images.dtype))
        return run(self, view, images)

    monkeypatch.setattr(type(deployed._deployment), "run", watched)
    (dense, row) = time_together({"dense": model.at("dense").eval(), "x": deployed}, 2, 0.0)
    assert set(seen) == {(BF16, torch.float32)} and len(seen) >= 7 + 3
    assert (dense.runner, row.runner) == ("fp32", "bf16")
    assert replace(BF16, batch=4) != BF16


def test_a_folder_from_before_without_a_runner_is_plain(model, images, tmp_path: Path):
    model.save(tmp_path / "m")
    loaded = saccade.load(tmp_path / "m")
    assert loaded.deployed is None and torch.equal(logits(loaded, images), logits(model, images))
    assert "runs in" not in repr(loaded).split("(vit)")[0]


def test_an_engine_of_the_processor_takes_a_model_that_is_elsewhere_there():
    assert Runner("fp32", "onnx").model(model := tiny()).vit is model.vit  # it is on the processor already
    away = tiny().to("meta")
    for engine in ("eager", "compile", "aoti"):
        assert next(Runner("bf16", engine).model(away).parameters()).device.type == "meta"
    for engine in ("onnx", "openvino"):  # what is on a meta device cannot be moved, which says that it was to be
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            Runner("bf16", engine).model(away)
