"""``Execution``: written rules, and a table that was measured when somebody asked."""

from __future__ import annotations

import copy
import time

import pytest
import torch

from oracles import RandomGates, add_gates, make_images, make_vit
from saccade.core.gates import Gates
from saccade.errors import UserError
from saccade.evaluation.stopwatch import autotune, share_that_pays
from saccade.execution.policy import LIMITS, Execution, attention_kind, skip_kind
from saccade.model import AdaptiveViT


@pytest.fixture(scope="module")
def vit():
    return make_vit("vit", depth=2)


class Steps:
    """A clock that goes on by what a list says, and stands still after it."""

    def __init__(self, *seconds: float) -> None:
        self.now, self.seconds = 0.0, list(seconds)

    def __call__(self) -> float:
        self.now += self.seconds.pop(0) if self.seconds else 1e-3
        return self.now


def test_a_forward_reads_no_clock_and_no_environment(vit, monkeypatch):
    gates = {b: RandomGates(b, 3, ("patch", "head", "attn", "mlp"), 0.6) for b in range(2)}
    model, images = add_gates(AdaptiveViT(vit), gates), make_images(vit, 4)
    model.execution = Execution()
    halves = copy.deepcopy(model).to(torch.bfloat16)
    with torch.inference_mode():
        expected = model(images).logits, halves(images.bfloat16()).logits

        def refused(*args):
            raise AssertionError("a forward asked")

        for clock in ("perf_counter", "monotonic", "time", "process_time", "perf_counter_ns"):
            monkeypatch.setattr(time, clock, refused)
        monkeypatch.setenv("SACCADE_SKIP", "never")
        monkeypatch.setenv("SACCADE_ATTENTION", "unfused")
        again = model(images).logits, halves(images.bfloat16()).logits
    assert all(map(torch.equal, expected, again))


def test_the_environment_is_read_when_a_model_is_made(vit, monkeypatch):
    monkeypatch.setenv("SACCADE_ATTENTION", "unfused")
    monkeypatch.setenv("SACCADE_SKIP", "never")
    model = AdaptiveViT(vit, "evit(0.5)").eval()
    assert model.execution == model.at("").execution == Execution("unfused", "never")
    assert "attention='unfused', skip='never'" in repr(model)
    assert all(name.startswith("unfused") for name in model(make_images(vit, 1)).trace.kernels)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"attention": "fast"}, "attention='fast' is not one of auto, fused, unfused"),
        ({"skip": True}, "skip='True' is not one of auto, always, never"),
        ({"measured": {"attention x": "quick"}}, "neither a path nor a share"),
        ({"measured": {"skip x": 1.5}}, "neither a path nor a share"),
        ({"measured": {"skip x": True}}, "neither a path nor a share"),
        ({"measured": {"other": "fused"}}, "neither a path nor a share"),
    ],
)
def test_what_is_no_execution_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        Execution(**given)


@torch.no_grad()
def test_a_measured_kind_beats_the_rule(vit):
    tokens = AdaptiveViT(vit).forward_tokens(make_images(vit, 4))[0]
    gates, q = Gates(patch=torch.ones(4, tokens.num_patches)), torch.zeros(1, 3, 17, 32)
    assert Execution().skips(LIMITS["rows"], tokens, gates) and not Execution().skips(1.0, tokens, gates)
    table = Execution(measured={skip_kind(tokens, gates): 0.3, attention_kind(q, 17): "unfused"})
    assert table.skips(0.3, tokens, gates) and not table.skips(0.31, tokens, gates)
    assert table.kernel(q, 17) == "unfused" and not table.is_timms()
    assert Execution().kernel(q, 17) == "fused" and Execution().is_timms()
    assert table.kernel(torch.zeros(1, 3, 17, 64), 17) == "fused", "another kind"
    assert Execution(skip="never").skips(0.0, tokens, gates) is False


@torch.no_grad()
def test_the_line_through_half_and_whole(vit):
    """Masked 12 ms, half 7 ms, whole 10 ms: skipping costs 2 ms and 10 ms times the share."""
    tokens = AdaptiveViT(vit).forward_tokens(make_images(vit, 4))[0]
    gates, turn = Gates(patch=torch.ones(4, tokens.num_patches)), []
    share = (tokens.num_prefix + tokens.num_patches / 2) / tokens.length
    for _ in range(8):
        for run in (0.012, 0.002 + 0.010 * share, 0.010):
            turn += [0.0, run]
    assert share_that_pays(vit.blocks[0], tokens, gates, Steps(*turn)) == pytest.approx((0.95 * 12 - 2) / 10)


def test_autotune_writes_a_table_that_a_model_runs_by(vit, tmp_path):
    file = tmp_path / "deep" / "table.json"
    model, images = AdaptiveViT(vit).eval(), make_images(vit, 2)
    found = autotune(model, ["topk(0.5, at=0)"], batch=[2], dtypes=["fp32"], out=file, clock=Steps())
    assert any(kind.startswith("attention cpu float32") for kind in found.measured)
    assert any(kind.startswith("skip cpu float32") and "index" in kind for kind in found.measured)
    read = Execution.from_cache(file)
    assert read.measured == found.measured and model.execution.measured == {}, "a model is told, never changed"
    view = model.at("topk(0.5, at=0)")
    view.execution = read
    assert view(images).logits.isfinite().all() and view.at("").execution is read
    more = autotune(model, batch=[2], dtypes=["bf16"], out=file, clock=Steps())
    assert more.measured.keys() > found.measured.keys(), "what is known of other kinds stays"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"skip x": 2}', '{"attention x": ["fused"]}', "[" * 5000])
def test_a_damaged_table_is_one_line(tmp_path, text):
    file = tmp_path / "table.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"saccade autotune|neither a path"):
        Execution.from_cache(file)
    with pytest.raises(UserError, match="saccade autotune"):
        Execution.from_cache(tmp_path / "none.json")


def test_a_batch_of_none_is_refused(vit, tmp_path):
    with pytest.raises(UserError, match="each must be 1 or more"):
        autotune(AdaptiveViT(vit), batch=[0], out=tmp_path / "x.json")
