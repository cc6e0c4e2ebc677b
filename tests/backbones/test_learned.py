"""What methods learn: by block and part, shared by settings that name these, and refused where it was not learned."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from oracles import make_images, make_vit
from registered_settings import SHAPE, learns, settings_of
from saccade.backbones.learned import Learned
from saccade.backbones.saving import save
from saccade.checkpoint import load
from saccade.core.registry import registry
from saccade.errors import UserError
from saccade.evaluation.untrained import untrained
from saccade.model import AdaptiveViT
from saccade.setting import Setting
from saccade.training.loss import method_losses
from saccade.training.multi_setting import MultiSettingModel

FIRST, SECOND = (0, 1), (1,)  # blocks to train at, and some of them
LEARNING = {
    name: next(text for text in settings_of(name)[::-1] if learns(text))
    for name, entry in registry().items()
    if entry.kind == "method" and any(map(learns, settings_of(name)))
}


def small(seed: int = 0):
    return make_vit("deit", seed=seed, **SHAPE).requires_grad_(False)


def placed(text: str, at) -> str:
    """A setting of one method, at other blocks."""
    (call,) = Setting.parse(text).calls
    kwargs = (*((k, v) for k, v in call.kwargs if k != "at"), ("at", at))
    return str(Setting((replace(call, kwargs=kwargs),)))


def train_a_step(model: AdaptiveViT) -> None:
    """One step of a few, on all that the model has learned."""
    model.train()
    optimizer = torch.optim.Adam(model.plan.parameters(), lr=0.05)
    out = model(make_images(model.vit, 2))
    sum(method_losses(model, out, 1.0).values(), start=out.logits.square().sum()).backward()
    optimizer.step()
    model.eval()


def shake(model: AdaptiveViT, seed: int = 0) -> AdaptiveViT:
    """Move all that is learned away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.learned.values():
            value += 0.1 * torch.randn(value.shape, generator=generator)
    return model


def logits(model: AdaptiveViT) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(make_images(model.vit, 2)).logits


@pytest.mark.parametrize("name", LEARNING)
def test_a_method_that_is_trained_at_some_blocks_runs_at_one_of_them_with_its_own_parameters(name):
    text = LEARNING[name]
    if "at" not in registry()[name].knobs:
        pytest.skip("it works at no block that a setting could name")
    try:
        AdaptiveViT(small(), placed(text, FIRST))
        first, second, other = placed(text, FIRST), placed(text, SECOND), placed(text, (1, 2))
    except UserError:  # it works at one block
        first, second, other = placed(text, 1), placed(text, 1), placed(text, 2)
    model = AdaptiveViT(small(), first)
    train_a_step(model)
    assert {key.split(".")[1] for key in model.learned} == {str(block) for block in model.plan.methods[0].at}
    assert any(model.learned.has_learned(key) for key in model.learned)

    fewer = model.at(second)
    method, whole = fewer.plan.methods[0], model.plan.methods[0]
    for place, step in zip(method.places(), method.steps, strict=True):
        twin = whole.steps[whole.places().index(place)]
        assert all(a is b for a, b in zip(step.parameters(), twin.parameters(), strict=True))

    alone = AdaptiveViT(model.vit, second)  # and so it runs: as one that has these parameters and no others
    for key, value in alone.learned.items():
        value.data.copy_(model.learned[key])
    assert torch.equal(logits(fewer), logits(alone))

    before = dict(model.learned)
    with pytest.raises(UserError, match=rf"^{name} has learned at block.* and not at block 2: .*fresh=True"):
        model.at(other)
    assert before == dict(model.learned), "what is refused leaves nothing behind"
    assert model.at(other, fresh=True).learned is model.learned


def test_until_something_is_learned_every_place_may_start():
    model = AdaptiveViT(small(), "dynamicvit(at=1)")
    model.at("dynamicvit(at=(2, 3))")
    assert {key.split(".")[1] for key in model.learned} == {"1", "2", "3"}
    assert untrained(model, "dynamicvit(at=(2, 3))") == ("dynamicvit",)
    half = AdaptiveViT(small(), "dynamicvit(at=1)").bfloat16()  # rounded is not learned
    half.at("dynamicvit(at=2)")
    assert untrained(half, "dynamicvit(at=2)") == ("dynamicvit",)
    twin = copy.deepcopy(model)
    twin.at("dynamicvit(at=0)")
    shake(twin)
    with pytest.raises(UserError, match="has learned at blocks 0, 1, 2, 3 and not at block 4"):
        AdaptiveViT(make_vit("deit", **{**SHAPE, "depth": 6}), "dynamicvit(at=4)", learned=twin.learned)
    model.at("dynamicvit(at=0)")  # the copy's training is its own


def test_a_knob_that_says_where_learning_starts_is_not_ignored():
    model = AdaptiveViT(small(), "ltmp(at=1, start=0.2)")
    before = dict(model.learned)
    for other in ("ltmp(at=1, start=0.9)", "ltmp(at=(1, 2), start=0.2, merge=0.5)"):
        with pytest.raises(UserError, match=r"^ltmp\(.*ltmp\.1\.\w+\.threshold has begun otherwise .* of its own"):
            model.at(other)
    assert before == dict(model.learned), "what is refused leaves nothing behind"
    assert model.at("ltmp(at=(1, 2), start=0.2)").learned is model.learned
    trained = shake(AdaptiveViT(small(), "ltmp(at=1, start=0.2)"))
    assert torch.equal(logits(trained.at("ltmp(at=1, start=0.9)")), logits(trained)), "it is a start and no more"
    half = AdaptiveViT(small(), "ltmp(at=1, start=0.3)").bfloat16()
    assert half.at("ltmp(at=1, start=0.3)").learned is half.learned


@pytest.mark.parametrize(
    ("trained", "asked", "message"),
    [
        (
            "ltmp(at=(0, 1), merge=None)",
            "ltmp(at=(0, 1))",
            r"has learned ltmp\.0\.prune, ltmp\.1\.prune and not ltmp\.0\.merge, ltmp\.1\.merge:",
        ),
        ("adavit(axes='patch')", "adavit()", r"has learned adavit\.1\.layers\.patch.* not adavit\.1\.layers\.head"),
        ("depth(3, head='own')", "depth(2, head='own')", r"depth\.heads\.3.* not depth\.heads\.2"),
        ("tokenlearner(4, at=1)", "tokenlearner(4, at=1, fuse_at=2)", "at block 1 and not at block 2"),
        ("tokenlearner(4, at=1)", "tokenlearner(4, at=0, fuse_at=1)", r"1\.learn and not .*0\.learn, .*1\.fuse"),
        ("dpc_knn(at=1, learned=True)", "dpc_knn(at=2, learned=True)", "at block 1 and not at block 2"),
    ],
)
def test_parts_are_told_apart(trained, asked, message):
    model = shake(AdaptiveViT(small(), trained))
    with pytest.raises(UserError, match=message):
        model.at(asked)


def test_a_part_of_what_was_learned_runs_as_it_was_learned():
    model = shake(AdaptiveViT(small(), "ltmp(at=(0, 1), merge=0.5)"))
    both, prunes = model.plan.methods[0], model.at("ltmp(at=(0, 1), merge=None)").plan.methods[0]
    assert both.places() == ("0.merge", "0.prune", "1.merge", "1.prune")
    assert [step.threshold for step in prunes.steps] == [both.steps[1].threshold, both.steps[3].threshold]


def test_a_method_that_stands_twice_has_two_sets_or_is_refused():
    model = AdaptiveViT(small(), "dynamicvit(0.5, at=1) | dynamicvit(0.5, at=2)")
    one, two = (method.steps[0].predictor.norm.weight for method in model.plan.methods)
    assert one is not two and len({*model.learned.values()}) == 20
    for setting in ("dynamicvit(at=1) | dynamicvit(0.5, at=(1, 2))", "ltmp(at=1) | ltmp(at=1, merge=None)"):
        learned = Learned()
        with pytest.raises(UserError, match=r"stands twice .* at block 1: give each its own blocks"):
            AdaptiveViT(small(), setting, learned=learned)
        assert not learned
    AdaptiveViT(small(), "evit(0.7, at=1) | evit(0.7, at=1)")  # nothing to learn, nothing to share


def test_training_may_start_at_other_blocks_than_were_trained():
    model = shake(AdaptiveViT(small(), "dynamicvit(at=1)"))
    student = MultiSettingModel(model, ["dynamicvit(at=1)", "dynamicvit(at=(1, 2))"])
    one, both = (view.plan.methods[0].steps for view in student.views)
    assert one[0].predictor.norm.weight is both[0].predictor.norm.weight


# --- folders ---------------------------------------------------------------------------------------------------------


def folder_of_before(model: AdaptiveViT, folder: Path, setting: str, trained: tuple[str, ...] = ()) -> Path:
    """A folder as it was written when parameters had the number of the step in their name."""
    save(model, folder)
    state, places = load_file(folder / "model.safetensors"), {}
    for call, method in zip(model.setting.calls, model.plan.methods, strict=True):
        places |= {f"learned.{call.name}.{place}.": f"learned.{call.name}.steps.{i}."
                   for i, place in enumerate(method.places())}  # fmt: skip
    named = {}
    for key, value in state.items():
        old = next((before for now, before in places.items() if key.startswith(now)), "")
        now = next((now for now in places if key.startswith(now)), "")
        named[old + key.removeprefix(now)] = value
    assert any(".steps." in key for key in named)
    save_file(named, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["saccade"] = {"format": 1, "setting": setting, **({"settings": list(trained)} if trained else {})}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("setting", "trained"),
    [
        ("dynamicvit(at=(1, 3))", ()),
        ("evit(0.7)", ("dynamicvit(0.5, at=(1, 3))", "dynamicvit(0.7, at=(1, 3))")),
        ("ltmp(at=(0, 2), merge=0.5)", ()),
        ("tome(r=2)", ("adavit(at=(1, 2))",)),
        ("tokenlearner(4, at=1, fuse_at=2)", ()),
        ("evit(0.8, at=0) | dynamicvit(at=2)", ()),
    ],
)
def test_a_folder_of_before_is_what_it_was(tmp_path, setting, trained):
    folder = tmp_path / "old"
    own, setting = setting, (*trained, setting)[0]
    model = shake(AdaptiveViT(small(), setting))
    folder_of_before(model, folder, own, trained)
    for found in (load(folder, setting), load(folder).at(setting)):
        assert found.learned.keys() == model.learned.keys()
        assert torch.equal(logits(found), logits(model))
    save(load(folder), tmp_path / "new")  # and it is saved by block
    assert torch.equal(logits(load(tmp_path / "new", setting)), logits(model))


def test_a_knob_of_a_folder_of_before_means_what_it_meant(tmp_path):
    """``form='released'`` was the code's way to read patches, and no more of it."""
    model = shake(AdaptiveViT(small(), "adavit(at=(1, 2))"))
    before = "adavit(0.7, at=(1, 2), form='released')"
    folder = folder_of_before(model, tmp_path / "old", before, (before, "adavit(0.6, 'patch', (1, 2))"))
    found = load(folder)
    assert str(found.setting) == "adavit(0.7, at=(1, 2), form='token')" == found.trained[0]
    assert torch.equal(logits(found), logits(model))
    save(found, tmp_path / "new")
    assert load(tmp_path / "new").setting == found.setting
    with pytest.raises(UserError, match=r"has learned .*not .*released"):
        load(folder, before)


def test_other_blocks_of_a_folder_of_before_are_refused(tmp_path):
    model = shake(AdaptiveViT(small(), "dynamicvit(at=(1, 3))"))
    folder = folder_of_before(model, tmp_path / "old", str(model.setting))
    assert torch.equal(logits(load(folder, "dynamicvit(at=3)")), logits(model.at("dynamicvit(at=3)")))
    for ask in (lambda: load(folder, "dynamicvit(at=2)"), lambda: load(folder).at("dynamicvit(at=2)")):
        with pytest.raises(UserError, match="dynamicvit has learned at blocks 1, 3 and not at block 2"):
            ask()


def test_one_predictor_that_served_two_blocks_is_at_both(tmp_path):
    model = shake(AdaptiveViT(small(), "dynamicvit(at=1)"))
    both = "dynamicvit(at=1) | dynamicvit(at=2)"
    found = load(folder_of_before(model, tmp_path / "old", both))
    one, two = (method.steps[0].predictor.norm.bias for method in found.plan.methods)
    assert torch.equal(one, two) and one.data_ptr() != two.data_ptr()
    assert torch.equal(one, model.learned["dynamicvit.1.predictor.norm.bias"])


@pytest.mark.parametrize(
    ("setting", "trained"),
    [
        ("dynamicvit(at=(1, 3))", ("dynamicvit(at=(1, 3))", "dynamicvit(at=3)")),  # step 0 was block 1's and block 3's
        ("dynamicvit(at=3)", ()),  # saved from a view at fewer blocks than were trained
        ("dynamicvit(at=(1, 3))", ("dynamicvit(at=77)",)),  # of another version
    ],
)
def test_what_settings_do_not_tell_is_refused_and_kept(tmp_path, setting, trained):
    model = shake(AdaptiveViT(small(), "dynamicvit(at=(1, 3))"))
    folder = folder_of_before(model, tmp_path / "old", setting, trained)
    for ask in (lambda: load(folder), lambda: load(folder, "dynamicvit(at=3)"), lambda: load(folder, "dense").at("dynamicvit(at=1)")):  # fmt: skip # noqa: E501
        with pytest.raises(UserError, match=r"dynamicvit\.steps\.0\..*do not tell the blocks.*rename.*train"):
            ask()
    found = load(folder, "evit(0.7)")  # others do not need it, and it is not lost
    assert sum(key.startswith("dynamicvit.steps.") for key in found.learned) == 20
    save(found, tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
