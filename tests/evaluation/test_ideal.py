"""The ideal of a setting: its token counts at its places, by slicing; and what ``bench`` makes of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oracles import make_images, make_vit, relative
from registered_settings import SHAPE, settings_of
from saccade.core import registry as core_registry
from saccade.core.plan import Method, Reducer
from saccade.core.reduction import SoftReduction
from saccade.core.registry import register, registry
from saccade.errors import UserError
from saccade.evaluation.ideal import decides, ideal_of
from saccade.evaluation.speed import Speed, Speeds, bench
from saccade.model import AdaptiveViT
from saccade.runners import deployment
from saccade.runners.deployment import Way
from saccade.runners.exported import has_fixed_counts
from small_runs import tiny

MADE = ["grid(24) | imagepiece(p=0.6, merge=0.2) | evit(0.7, fuse=True, at=2)", "depth(3) | tome(r=5)"]
MADE += [
    "depth(3, head='own') | dynamicvit(0.5)",
    "kth(2, at=0) | tokenlearner(9, at=1) | tome(r=1)",
    "stem() | evit()",
]
ALL = [text for name, entry in registry().items() for text in settings_of(name)[-2:] if entry.kind == "method"]
NONE = {
    "adavit(0.7)": "chooses what of a block runs",
    "topk(0.5)": "chooses what of a block runs",
    "ats(0.5)": "not known beforehand",
    "evit(0.7) | ltmp(0.5)": "not known beforehand",
    "dynamicvit(0.5, threshold=0.9)": "not known beforehand",
    "quadtree(31, size=128) | tome(r=2)": "its tokenizer chooses",
    "tokenlearner(6, at=1, fuse_at=2)": "not known beforehand",
}


@pytest.fixture(scope="module")
def vit():
    return make_vit("deit", seed=1, **SHAPE).requires_grad_(False)


def counts(model: AdaptiveViT, images: Tensor) -> tuple[list[tuple[int, int]], float, int]:
    """Tokens in attention and MLP of each block, MACs, and of them those of deciding."""
    trace = model(images).trace
    deciding = sum(block.aux_macs for block in trace.blocks)
    return [block.static_counts for block in trace.blocks], float(trace.macs()[0]), deciding


@torch.no_grad()
@pytest.mark.parametrize("text", ALL + MADE)
def test_counts_are_those_of_the_setting_and_macs_too_but_for_deciding(vit, text):
    model = AdaptiveViT(vit, text)
    try:
        setting = ideal_of(model)
    except UserError as error:
        assert any(reason in str(error) for reason in NONE.values()) and "\n" not in str(error)
        assert text not in MADE
        return
    images = make_images(vit, 2)
    (tokens, macs, deciding), (cut, least, none) = counts(model, images), counts(model.at(setting), images)
    assert cut == tokens
    assert (least, none) == (macs - deciding, 0)


@pytest.mark.parametrize(("text", "reason"), NONE.items())
def test_what_has_no_ideal_says_why(vit, text, reason):
    model = AdaptiveViT(vit, text)
    with pytest.raises(UserError, match=reason) as refused:
        ideal_of(model)
    assert str(refused.value).startswith(str(model.setting))


class Twice(Reducer):
    """As many tokens again."""

    def count(self, n: int) -> int:
        return 2 * n

    def forward(self, tokens):
        return SoftReduction(torch.eye(tokens.num_patches).repeat(2, 1).expand(len(tokens.x), -1, -1))


def test_what_makes_more_tokens_has_none(vit, monkeypatch):
    monkeypatch.setattr(core_registry, "_REGISTRY", dict(registry()))
    register("twice")(lambda backbone: Method([(1, Twice())]))
    with pytest.raises(UserError, match=r"twice.. has no ideal: it brings tokens back"):
        ideal_of(AdaptiveViT(vit, "evit(0.5, at=0) | twice()"))


def test_it_is_a_setting_that_can_be_written_by_hand(vit):
    model = AdaptiveViT(vit)
    assert str(ideal_of(model.at("evit(0.5)"))) == "cut((32, 16, 8), at=(1, 2, 3))"
    assert str(ideal_of(model.at("grid(32) | depth(2) | dynamicvit(0.5, at=1)"))) == (
        "grid(32) | depth(2) | cut(8, at=1, site='block')"
    )
    assert ideal_of(model.at("cut((32, 16, 8), at=(1, 2, 3))")) == model.at("cut((32, 16, 8), at=(1, 2, 3))").setting
    assert [decides(model.at(text)) for text in ("dense", "grid(32)", "depth(2)", "evit(0.5)")] == [False] * 3 + [True]


def sliced(vit, images: Tensor, before: list[int], between: list[int]) -> Tensor:
    """timm's forward, with all but the first so many patch tokens cut off before each block and before its MLP."""
    prefix = vit.num_prefix_tokens
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    for block, enter, stay in zip(vit.blocks, before, between, strict=True):
        x = x[:, : prefix + enter]
        x = x + block.ls1(block.attn(block.norm1(x)))
        x = x[:, : prefix + stay]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return vit.forward_head(vit.norm(x))


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "distilled", "dinov2-registers", "siglip", "registers-average"])
def test_it_computes_what_plain_slicing_computes(family):
    """Of sixteen patches; the prefix goes through whole."""
    vit = make_vit(family)
    images = make_images(vit, 2)
    by_hand = sliced(vit, images, [16, 9, 5], [12, 9, 2])
    model = AdaptiveViT(vit, "cut((12, 2), at=(0, 2)) | cut((9, 5), at=(1, 2), site='block')")
    assert relative(model(images).logits, by_hand) <= 1e-5
    owner = model(images).trace.blocks[1].owner
    assert owner.tolist() == [[*range(9), *[-1] * 7]] * 2


class Operators(TorchDispatchMode):
    """The names of all that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("text", ["tome(r=9)", "evit(0.5)", "dynamicvit(0.5)"])
def test_nothing_is_scored_matched_or_gathered(vit, text):
    model, images = AdaptiveViT(vit, text), make_images(vit, 2)

    def operators(view: AdaptiveViT) -> set[str]:
        with Operators() as mode:
            view.forward_tokens(images)
        return mode.seen

    # a block in which tokens are cut is restated, as it is for the setting itself: its attention, sums and reshapes
    restated = operators(model.at("random(0.5, at=[0, 1, 2, 3])")) - {"embedding", "argsort", "sort", "scatter"}
    deciding = {
        "topk",
        "sort",
        "argsort",
        "gather",
        "scatter",
        "scatter_add",
        "embedding",
        "index",
        "index_select",
        "max",
    }
    assert deciding & operators(model)
    assert not deciding & operators(model.at(ideal_of(model)))
    assert operators(model.at(ideal_of(model))) <= restated | operators(model.at("dense")) | {"slice"}


@torch.no_grad()
@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_it_is_exported_like_any_setting(engine):
    if engine == "onnx":
        pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
        pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    model = tiny()
    cut = model.at(ideal_of(model.at("tome(r=3)"))).eval()
    images = torch.randn(3, 3, 64, 64)
    assert relative(cut.runner(engine)(images), cut(images).logits) <= 1e-3


# In bench


def test_bench_compares_with_dense_in_the_same_runner_and_with_the_ideal():
    texts = ["evit(0.5)", "topk(0.5)", "grid(32)", "cut(8, at=0)", "tome(r=(8,))"]
    rows = bench(tiny(), texts, batch=[1, 2], runner=["eager", "bf16"], ideal=True, seconds=0)
    names = ["dense", *texts[:-1], "tome(r=(8,))"]
    assert [(r.batch, r.runner, r.setting) for r in rows] == [*itertools.product((1, 2), ("fp32", "bf16"), names)]
    times = {(r.batch, r.runner, r.setting): r.p50_ms for r in rows}
    for row in rows:
        assert row.speedup == pytest.approx(times[row.batch, "fp32", "dense"] / row.p50_ms)
        ratio = times[row.batch, row.runner, "dense"] / row.p50_ms
        assert row.conversion == pytest.approx(ratio / row.mac_ratio)
        assert row.worth_it == (ratio >= 1 - 1e-9 or row.mac_ratio <= 1.01)
        assert (row.kept is None) == (not row.ideal)
    of = {r.setting: r for r in rows if r.runner == "bf16" and r.batch == 2}
    assert "chooses" in of["topk(0.5)"].no_ideal and not of["topk(0.5)"].ideal
    assert not any(of[name].ideal or of[name].no_ideal for name in ("dense", "grid(32)"))
    assert of["cut(8, at=0)"].kept == 1.0, "it is its own ideal, timed once"
    # 16 tokens and 8 of them merged away: what the cut leaves, and it is the same model that is timed
    assert of["tome(r=(8,))"].ideal == of["cut(8, at=0)"].ideal == "cut(8, at=0)"
    assert of["tome(r=(8,))"].kept == pytest.approx(of["cut(8, at=0)"].p50_ms / of["tome(r=(8,))"].p50_ms)
    table = rows.table()
    assert {"runner", "kept"} <= {*table.columns}
    assert "over dense in fp32" in table.caption and "topk(0.5) has no ideal" in table.caption
    assert table.caption.count("topk(0.5)") == 1


def test_an_engine_is_not_said_to_use_pytorchs_kernels_and_memory():
    (row,) = bench(tiny(depth=1), batch=[2], runner="torch", ideal=True, seconds=0)
    assert (row.runner, row.kernels, row.memory_mb, row.kept) == ("fp32 torch", "", None, None)
    assert row.gmacs > 0 and "MB" not in row_text(row)


def row_text(row: Speed) -> str:
    return Speeds([row]).table().render(None)


@pytest.mark.parametrize(
    ("text", "fixed"),
    [("dense", True), ("evit(0.5) | tome(r=2)", True), ("topk(0.5)", True), ("quadtree(31, size=128)", True)]
    + [(text, False) for text in ("adavit(0.7)", "adavit(axes=('head',))", "random_plus(0.6)", "ats(0.5)")]
    + [(text, False) for text in ("quadtree(threshold=7.7)", "quadtree(per_batch=31)", "topk(0.5, at=1) | evit(at=1)")],
)
def test_a_graph_that_masks_says_so(vit, text, fixed):
    assert has_fixed_counts(AdaptiveViT(vit, text)) is fixed


def test_rows_say_what_is_masked(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    rows = bench(tiny(), ["adavit(0.7)", "evit(0.5)"], batch=[1], runner=["eager", "compile"], seconds=0)
    assert [(r.setting, r.runner) for r in rows if r.masked] == [("adavit(0.7)", "fp32 compiled")]
    assert "more MACs than is said: adavit(0.7) in fp32 compiled." in rows.table().caption


def test_without_being_asked_there_is_no_ideal():
    rows = bench(tiny(), ["evit(0.5)"], batch=[1], seconds=0)
    assert all((row.kept, row.ideal, row.no_ideal) == (None, "", "") for row in rows)
    text = rows.table().render(None)
    assert "kept" not in text and "runner" not in text


def test_an_engine_that_is_not_there_is_named_before_anything_is_timed(monkeypatch):
    monkeypatch.setattr("saccade.runners.engine.missing", lambda engine: f"pip install 'saccade[{engine.EXTRA}]'")
    monkeypatch.setattr("saccade.evaluation.speed.interleaved", lambda *a, **k: pytest.fail("timed"))
    with pytest.raises(UserError, match=r"engine 'onnx' is not installed here: pip install 'saccade\[onnx\]'"):
        bench(tiny(), ["evit(0.5)"], runner=["eager", "onnx"], seconds=0)


def test_an_engine_that_fails_names_setting_and_runner(monkeypatch):
    def broken(module, **options):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"^dense · fp32 compiled: torch.compile does not work here.*no C\+\+ compiler"):
        bench(tiny(), batch=[1], runner=["eager", "compile"], seconds=0)


@torch.no_grad()
def test_many_settings_of_one_runner_take_turns_without_being_made_again(monkeypatch):
    made: list[str] = []

    class Counted(Way):
        def __init__(self, view, runner):
            made.append(str(view.setting))
            super().__init__(view, runner)

    monkeypatch.setattr(deployment, "Way", Counted)
    base, images = tiny().deploy("bf16"), torch.randn(1, 3, 64, 64)
    views = [base.at(f"cut({n})").eval() for n in range(1, deployment.VIEWS + 4)]
    for _ in range(3):
        for view in views:
            view(images)
    assert len(made) == len({*made}) == len(views)
    with torch.no_grad():
        base.vit.head.bias.add_(1)
    before = views[0].deploy(None)(images).logits
    assert relative(views[0](images).logits, before) < 0.1, "changed weights are noticed all the same"
    assert len(made) == len(views) + 1
