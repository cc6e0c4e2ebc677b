"""ImagePiece against its procedure by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from data_helpers import write_folder
from oracles import (
    encode_by_hand,
    logits_by_hand,
    make_images,
    make_tokens,
    make_vit,
    merge_by_hand,
    prune_by_hand,
    relative,
    retokenize_by_hand,
    with_fields,
)
from saccade import reports as views
from saccade.analysis import analyze, merging
from saccade.checkpoint import load
from saccade.core.reduction import Reduction, reduce
from saccade.errors import UserError
from saccade.evaluation import sweep
from saccade.methods.imagepiece import Interpretation, Retokenize
from saccade.model import AdaptiveViT
from saccade.runners.exported import Answer
from saccade.setting import Setting
from saccade.training import train as training
from saccade.training.config import read_config
from saccade.training.setting_sampler import Sampler
from small_runs import files


def retokenizer(p=0.3, merge=0.08, metric="key", weighted=True) -> Retokenize:
    return Retokenize(p, merge, Interpretation(metric, weighted), 16, 196)


def judged_tokens(patches: int, seed: int = 0, images: int = 3):
    torch.manual_seed(seed)
    state = {"key": torch.randn(images, patches, 16), "cls_attn": torch.rand(images, patches)}
    return make_tokens(images, patches, seed=seed, size=torch.randint(1, 5, (images, patches)).float(), **state)


@pytest.mark.parametrize(("patches", "p", "merge"), [(196, 0.3, 0.08), (50, 0.5, 0.2), (13, 1.0, 0.3), (9, 0.35, 0.5)])
def test_equals_the_procedure_by_hand(patches, p, merge):
    tokens = judged_tokens(patches)
    found = reduce(tokens, retokenizer(p, merge)(tokens))
    for b in range(3):
        args = tokens.patches[b], tokens.stats.cls_attn[b], tokens.stats.key[b], tokens.size[b].tolist()
        x, size, _ = retokenize_by_hand(*args, p, merge, prefix=0)
        torch.testing.assert_close(found.patches[b], x, rtol=0, atol=1e-5)
        assert found.size[b].tolist() == size


@pytest.mark.parametrize("family", ["vit", "distilled", "deit3", "qk-norm"])
@pytest.mark.parametrize("keep", [1.0, 0.7])
def test_whole_model_equals_the_procedure_by_hand(family, keep):
    vit = make_vit(family, depth=6)
    prefix = vit.num_prefix_tokens

    def step(block, x, attention, key, size):
        if block in (2, 3, 4):
            return prune_by_hand(x, attention[0], size, keep, prefix)
        return retokenize_by_hand(x, attention[0], key, size, 0.6, 0.2, prefix)[:2] if block < 2 else (x, size)

    images = make_images(vit)
    with torch.no_grad():
        found = AdaptiveViT(vit, f"imagepiece(p=0.6, merge=0.2, keep={keep})")(images).logits
    assert relative(found, logits_by_hand(vit, images, step)) <= 1e-5


@pytest.mark.parametrize("patches", [196, 181, 100, 50])
def test_only_the_least_attended_merge(patches):
    tokens = judged_tokens(patches)
    bottom = math.floor(0.3 * patches)
    reduction = retokenizer()(tokens)
    for b in range(3):
        order = tokens.stats.cls_attn[b].argsort().tolist()
        into = reduction.keep[b, reduction.merge.dst[b]].tolist()
        merged = {*reduction.merge.src[b].tolist(), *into}
        assert merged <= set(order[:bottom])
        attentive = order[-math.ceil(0.7 * patches) :]
        assert not merged & set(attentive), "the share of merged tokens in the top 70 % is 0"
    found = reduce(tokens, reduction)
    for b in range(3):
        into = set(reduction.merge.dst[b].tolist())
        for slot, token in enumerate(reduction.keep[b].tolist()):
            assert (slot in into) or relative(found.patches[b, slot], tokens.patches[b, token]) <= 1e-6


def test_while_tome_merges_attentive_tokens():
    """The negative control: on random data about 70 % of what ToMe merges is in the top 70 %."""
    tokens = judged_tokens(196)
    groups = merge_by_hand(tokens.patches[0], tokens.stats.key[0], [1.0] * 196, 13, has_class=False)[2]
    merged = {i for group in groups if len(group) > 1 for i in group}
    attentive = set(tokens.stats.cls_attn[0].argsort().tolist()[-137:])
    assert 0.5 < len(merged & attentive) / len(merged) < 0.9


@pytest.mark.parametrize("patches", [196, 167, 33, 14])
def test_sides_interleave_and_the_best_edges_win(patches):
    tokens = judged_tokens(patches)
    method = retokenizer()
    reduction = method(tokens)
    bottom, r = math.floor(0.3 * patches), math.floor(0.08 * patches)
    assert reduction.merge.src.shape == (3, r) and method.count(patches) == patches - r
    for b in range(3):
        order = tokens.stats.cls_attn[b].argsort().tolist()[:bottom]
        side_a, side_b = order[0::2], order[1::2]
        assert len(side_a) - len(side_b) in (0, 1)
        into = reduction.keep[b, reduction.merge.dst[b]].tolist()
        assert set(reduction.merge.src[b].tolist()) <= set(side_a) and set(into) <= set(side_b)
        unit = tokens.stats.key[b] / tokens.stats.key[b].norm(dim=-1, keepdim=True)
        best = {i: max(float(unit[i] @ unit[j]) for j in side_b) for i in side_a}
        assert set(reduction.merge.src[b].tolist()) == set(sorted(side_a, key=lambda i: -best[i])[:r])
        for i, j in zip(reduction.merge.src[b].tolist(), into, strict=True):
            assert float(unit[i] @ unit[j]) == pytest.approx(best[i], abs=1e-6)


@pytest.mark.parametrize(
    ("setting", "counts"),
    [
        ("imagepiece(keep=0.8)", [181, 167, 154, 124, 115, 106, 85, 79, 73, 59, 59, 59]),
        ("imagepiece() | evit(0.8)", [181, 167, 154, 124, 115, 106, 85, 79, 73, 59, 59, 59]),
        ("evit(0.7)", [196] * 3 + [138] * 3 + [97] * 3 + [68] * 3),
    ],
)
def test_trajectory(setting, counts):
    vit = make_vit(depth=12, embed_dim=24, img_size=224)
    with torch.no_grad():
        trace = AdaptiveViT(vit, setting)(make_images(vit, 1)).trace
    assert trace.tokens() == [count + 1 for count in counts]


@pytest.mark.parametrize(("keep", "tokens"), [(0.8, 60), (0.7, 41), (0.6, 27), (0.5, 16), (0.4, 9), (0.3, 5)])
def test_output_tokens(keep, tokens):
    """The paper publishes 26 at the speed that fits 0.6."""
    vit = make_vit(depth=12, embed_dim=24, img_size=224)
    with torch.no_grad():
        assert AdaptiveViT(vit, f"imagepiece(keep={keep})")(make_images(vit, 1)).trace.tokens()[-1] == tokens


@pytest.mark.parametrize("r", [1, 5, 24])
def test_with_all_tokens_judged_alike_it_is_tome(r):
    """p = 1, r of N, and the order of attention replaced by the order of places."""
    patches = 50
    tokens = judged_tokens(patches)
    by_place = torch.linspace(0, 1, patches).expand(3, -1)
    found = reduce(tokens, retokenizer(1.0, r / patches)(with_fields(tokens, cls_attn=by_place)))
    for b in range(3):
        sizes = tokens.size[b].tolist()
        x, sizes, groups = merge_by_hand(tokens.patches[b], tokens.stats.key[b], sizes, r, has_class=False)
        ours = sorted(range(found.num_patches), key=lambda i: float(found.patches[b, i, 0]))
        theirs = sorted(range(len(groups)), key=lambda i: float(x[i, 0]))
        torch.testing.assert_close(found.patches[b, ours], x[theirs], rtol=0, atol=1e-5)
        assert found.size[b, ours].tolist() == [sizes[i] for i in theirs]


@torch.no_grad()
def test_without_merging_it_is_evit_and_without_both_it_is_nothing():
    vit = make_vit(depth=6)
    images = make_images(vit)
    pruned, _ = AdaptiveViT(vit, "evit(0.7)").forward_tokens(images)
    assert torch.equal(AdaptiveViT(vit, "imagepiece(merge=0, keep=0.7)").forward_tokens(images)[0].x, pruned.x)
    dense, _ = AdaptiveViT(vit).forward_tokens(images)
    assert torch.equal(AdaptiveViT(vit, "imagepiece(merge=0)").forward_tokens(images)[0].x, dense.x)
    kept = AdaptiveViT(vit, "imagepiece(p=0.6, merge=0.2)")(images).trace.tokens()
    assert kept == AdaptiveViT(vit, "imagepiece(p=0.6, merge=0.2, keep=1)")(images).trace.tokens()


@torch.no_grad()
def test_a_block_that_does_both_prunes_first():
    vit = make_vit(depth=4)
    images = make_images(vit)

    def step(block, x, attention, key, size):
        if block != 1:
            return x, size
        score = attention[0]
        pruned, size = prune_by_hand(x, score, size, 0.75)
        kept = [i for i in range(len(x)) if any(torch.equal(x[i], row) for row in pruned)]
        return retokenize_by_hand(pruned, score[kept], key[kept], size, 0.6, 0.3)[:2]

    model = AdaptiveViT(vit, "imagepiece(p=0.6, merge=0.3, keep=0.75, merge_at=1, prune_at=1)")
    assert relative(model(images).logits, logits_by_hand(vit, images, step)) <= 1e-5


def test_plain_mean_where_not_weighted():
    tokens = judged_tokens(10, images=1)
    reduction = retokenizer(1.0, 0.1, weighted=False)(tokens)
    found = reduce(tokens, reduction)
    source, slot = int(reduction.merge.src), int(reduction.merge.dst)
    into = int(reduction.keep[0, slot])
    mean = (tokens.patches[0, source] + tokens.patches[0, into]) / 2
    torch.testing.assert_close(found.patches[0, slot], mean)
    assert found.size[0, slot] == tokens.size[0, source] + tokens.size[0, into]


def test_the_metric_may_be_the_features():
    tokens = judged_tokens(20)
    by_x = retokenizer(1.0, 0.2, metric="x")(tokens)
    same = retokenizer(1.0, 0.2)(with_fields(tokens, key=tokens.patches))
    assert torch.equal(by_x.merge.src, same.merge.src) and torch.equal(by_x.merge.dst, same.merge.dst)
    assert not torch.equal(by_x.merge.src, retokenizer(1.0, 0.2)(tokens).merge.src)


@pytest.mark.parametrize("patches", range(1, 12))
def test_few_tokens(patches):
    """k < 2, odd k, and more merges asked for than there are pairs."""
    for p in (0.0, 0.1, 0.3, 0.5, 1.0):
        for merge in (0.0, 0.08, 0.5, 1.0):
            method = retokenizer(p, merge)
            tokens = judged_tokens(patches)
            bottom = math.floor(p * patches + 1e-9)
            most = math.ceil(bottom / 2) if bottom > 1 else 0
            assert method.count(patches) == patches - min(math.floor(merge * patches + 1e-9), most)
            if method.count(patches) < patches:
                reduction = method(tokens)
                assert isinstance(reduction, Reduction)
                found = reduce(tokens, reduction)
                assert found.num_patches == method.count(patches) and found.x.isfinite().all()
                torch.testing.assert_close(found.size.sum(1), tokens.size.sum(1))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("imagepiece(p=1.5)", r"p=1.5 .*\[0, 1\]"),
        ("imagepiece(p=-0.1)", r"p=-0.1"),
        ("imagepiece(merge=2)", r"merge=2 .*\[0, 1\]"),
        ("imagepiece(merge='a')", r"merge='a'"),
        ("imagepiece(keep=0)", r"keep=0 .*\[0.001, 1\]"),
        ("imagepiece(metric='q')", r"metric='q' is not one of key, x"),
        ("imagepiece(score='x')", r"score='x'"),
        ("imagepiece(merge_at=9)", r"block 9 is not one of 0 … 2"),
        ("imagepiece(prune_at=[1, 3])", r"block 3"),
        ("imagepiece(weighted='no')", r"weighted='no'"),
        ("imagepiece(weighted=1)", r"weighted=1"),
    ],
)
def test_knobs_out_of_range(setting, says):
    with pytest.raises(UserError, match=rf"^imagepiece: .*{says}|^imagepiece: {says}"):
        AdaptiveViT(make_vit(), setting)


# --- statistics: the paper's Tables 5 to 7 ----------------------------------------------------------------------------


def statistics_by_hand(vit, image, decide, p, tops):
    """For each block: (inattentive, risen), cosines of all pairs that become one, merged tokens and how many are top.

    ``decide`` is as in ``logits_by_hand`` and also gives the groups of patch tokens (indices of the sequence).
    """
    found, low_before, went = [], set(), {}

    def step(block, x, attention, key, size):
        nonlocal low_before, went
        patches = list(range(vit.num_prefix_tokens, len(x)))
        order = sorted(patches, key=lambda i: float(attention[0][i]))
        low = set(order[: math.floor(p * len(patches) + 1e-9)])
        left = [went[i] for i in low_before if i in went]  # those of the block before that are still there
        x, size, groups = decide(block, x, attention, key, size)
        merged = [i for group in groups if len(group) > 1 for i in group]
        unit = key / key.norm(dim=-1, keepdim=True)
        cosines = [float(unit[i] @ unit[j]) for g in groups for i, j in itertools.combinations(g, 2)]
        top = {k: len(set(merged) & set(order[math.floor((1 - k) * len(patches) + 1e-9) :])) for k in tops}
        found.append(((len(left), sum(i not in low for i in left)), cosines, len(merged), top))
        low_before = low
        went = {i: slot + vit.num_prefix_tokens for slot, group in enumerate(groups) for i in group}
        return x, size

    encode_by_hand(vit, image, step)
    return found


def as_groups(before: int, pairs: list[tuple[int, int]], prefix: int = 1) -> list[list[int]]:
    sources = {source for source, _ in pairs}
    kept = [i for i in range(prefix, before) if i not in sources]
    return [[i, *(source for source, into in pairs if into == i)] for i in kept]


@pytest.mark.parametrize("family", ["vit", "distilled"])
@pytest.mark.parametrize("kind", ["tome", "imagepiece", "evit"])
def test_statistics_are_those_of_slow_loops(family, kind):
    vit = make_vit(family, depth=4)
    prefix = vit.num_prefix_tokens
    setting = {
        "tome": "tome(r=4)",
        "imagepiece": "imagepiece(p=0.7, merge=0.25, keep=0.6, prune_at=2)",
        "evit": "evit(0.6)",
    }

    def decide(block, x, attention, key, size):
        n = len(x)
        if kind == "tome":
            x, size, groups = merge_by_hand(x, key, size, 4, has_class=True, has_dist=prefix == 2)
            return x, size, [g for g in groups if min(g) >= prefix]
        if block < 2 and kind == "imagepiece":
            x, size, pairs = retokenize_by_hand(x, attention[0], key, size, 0.7, 0.25, prefix)
            return x, size, as_groups(n, pairs, prefix)
        if (block == 2 and kind == "imagepiece") or (kind == "evit" and block in (1, 2, 3)):
            scores = attention[0].tolist()
            count = math.ceil(0.6 * (n - prefix) - 1e-9)
            kept = sorted(sorted(range(prefix, n), key=lambda i: -scores[i])[:count])
            x, size = prune_by_hand(x, attention[0], size, 0.6, prefix)
            return x, size, [[i] for i in kept]
        return x, size, [[i] for i in range(prefix, n)]

    images = make_images(vit, 3)
    tops = merging.TOPS
    found = merging.count(AdaptiveViT(vit, setting[kind]), images, p=0.4)
    assert [c.block for c in found] == [0, 1, 2, 3]
    for b, image in enumerate(images):
        for ours, ((low, risen), cosines, merged, top) in zip(
            found, statistics_by_hand(vit, image, decide, 0.4, tops), strict=True
        ):
            assert (ours.inattentive[b], ours.risen[b], ours.merged[b]) == (low, risen, merged)
            assert ours.pairs[b] == len(cosines)
            assert float(ours.similarity[b]) == pytest.approx(sum(cosines), abs=1e-4)
            assert {k: float(v[b]) for k, v in ours.top.items()} == top


def test_statistics_of_imagepiece_and_of_a_model_that_reduces_nothing():
    vit = make_vit(depth=4, img_size=112)
    images = make_images(vit, 4)
    for counts in merging.count(AdaptiveViT(vit, "imagepiece(merge=0.1, merge_at=[0, 1, 2])"), images)[:3]:
        assert float(counts.merged.sum()) > 0 and float(counts.top[0.7].sum()) == 0, "by construction"
    dense = merging.count(AdaptiveViT(vit), images)
    assert all(float(c.pairs.sum() + c.merged.sum()) == 0 for c in dense)
    assert float(dense[0].inattentive.sum()) == 0 and all(float(c.inattentive.sum()) == 4 * 14 for c in dense[1:])
    assert all(0 < float(c.risen.sum()) < float(c.inattentive.sum()) for c in dense[1:])
    tome = merging.count(AdaptiveViT(vit, "tome(r=12)"), images)
    assert 0.4 < float(tome[0].top[0.7].sum() / tome[0].merged.sum()) < 0.95, "the negative control"


@pytest.mark.parametrize(
    "setting", ["adavit(0.7)", "quadtree(31, size=128)", "dynamicvit(0.5, threshold=0.5)", "stem()"]
)
def test_statistics_of_ragged_and_gated_settings(setting):
    vit = make_vit(depth=4)
    for counts in merging.count(AdaptiveViT(vit, f"{setting} | tome(r=2)").eval(), make_images(vit, 3)):
        assert (counts.risen <= counts.inattentive).all() and (counts.merged <= counts.tokens).all()
        assert (counts.similarity.abs() <= counts.pairs + 1e-6).all()


def test_statistics_do_not_depend_on_the_batch_and_change_nothing():
    vit = make_vit(depth=4)
    model, images = AdaptiveViT(vit, "imagepiece(p=0.7, merge=0.2)"), make_images(vit, 4)
    before = model(images).logits
    whole = merging.count(model, images)
    parts = [merging.count(model, images[i : i + 1]) for i in range(4)]
    for i, counts in enumerate(whole):
        joined = merging.together(tuple(part[i] for part in parts))
        assert torch.equal(joined.risen, counts.risen) and torch.allclose(joined.similarity, counts.similarity)
    assert torch.equal(model(images).logits, before)


def test_a_ratio_has_an_interval_over_images():
    generator = torch.Generator().manual_seed(0)
    wholes = torch.randint(5, 20, (400,), generator=generator).double()
    parts = torch.stack([(torch.rand(int(w), generator=generator) < 0.3).sum() for w in wholes]).double()
    found = merging.ratio(parts, wholes)
    assert found.mean == pytest.approx(float(parts.sum() / wholes.sum())) and found.low < 0.3 < found.high
    expected = 1.96 * math.sqrt(0.21 / float(wholes.sum()))
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.25)
    assert merging.ratio(torch.zeros(3), torch.zeros(3)) is None


def test_the_analysis_writes_a_table_for_each_setting(tmp_path):
    photos = write_folder(tmp_path / "photos", files(each=4))
    settings = ["dense", "tome(r=3)", "imagepiece(p=0.7, merge=0.2)"]
    model = AdaptiveViT(make_vit(depth=4))
    found = analyze(model, photos, settings, "merging", batch=5, out=tmp_path / "out")["merging"]
    assert [*found.data["layers"]] == settings and "`dense` merges nothing." in found.lines
    rows = found.data["layers"]["tome(r=3)"]
    assert [row["block"] for row in rows] == [0, 1, 2, 3] and rows[0]["risen"] is None
    assert all(low <= mean <= high for row in rows for mean, low, high in [row["similarity"]])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "attended to again" in page and page.count("block 3") >= 3
    with pytest.raises(UserError, match=r"merging: p=1 is not between 0 and 1"):
        analyze(model, photos, settings, "merging(p=1)")
    with pytest.raises(UserError, match=r"merging: metric='q'"):
        analyze(model, photos, settings, "merging(metric='q')")


# --- dense maps ------------------------------------------------------------------------------------------------------


def map_by_hand(vit, image, kind):
    """The dense map [G, D] after the last block, normed: patches carry the lists of cells that they stand for."""
    prefix, count = vit.num_prefix_tokens, vit.patch_embed.num_patches
    cells = [[], *([] for _ in range(prefix - 1)), *([i] for i in range(count))]

    def step(block, x, attention, key, size):
        nonlocal cells
        if kind == "tome":  # sides are the places in the whole sequence; the class token's is A
            even, odd = prefix - prefix % 2, prefix % 2 == 1
            rows, sizes, groups = merge_by_hand(x[even:], key[even:], size[even:], 3, has_class=odd)
            x, size = torch.cat([x[:even], rows]), size[:even] + sizes
            groups = [[i + even for i in group] for group in groups][odd:]
        else:
            n = len(x)
            x, size, pairs = retokenize_by_hand(x, attention[0], key, size, 0.7, 0.2, prefix)
            groups = as_groups(n, pairs, prefix)
        cells = cells[:prefix] + [[cell for i in group for cell in cells[i]] for group in groups]
        return x, size

    x, size = encode_by_hand(vit, image, step)
    assert [len(own) for own in cells[prefix:]] == size[prefix:] and len(size) < prefix + count
    found = x.new_full((count, x.shape[1]), torch.nan)
    for row, own in zip(x[prefix:], cells[prefix:], strict=True):
        found[own] = row
    return vit.norm(found)


@torch.no_grad()
@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("vit", "imagepiece(p=0.7, merge=0.2, merge_at=[0, 1, 2, 3])"),
        ("distilled", "imagepiece(p=0.7, merge=0.2, merge_at=[0, 1, 2, 3])"),
        ("dinov2-registers", "imagepiece(p=0.7, merge=0.2, merge_at=[0, 1, 2, 3])"),
        ("distilled", "tome(r=3)"),
        ("dinov2-registers", "tome(r=3)"),
        ("registers-average", "tome(r=3)"),
    ],
)
def test_merged_tokens_are_restored_after_any_block(family, setting, blocks):
    """With distillation and register tokens, which are never in a map."""
    vit = make_vit(family, depth=4)
    images = make_images(vit)
    found = AdaptiveViT(vit, f"{setting} | depth({blocks})").feature_map(images).flatten(2).transpose(1, 2)
    vit.blocks = vit.blocks[:blocks]
    expected = torch.stack([map_by_hand(vit, image, setting.split("(")[0]) for image in images])
    assert relative(found, expected) <= 1e-5


# --- composition, and training ---------------------------------------------------------------------------------------

TOGETHER = {"quadtree(100) | imagepiece() | evit(0.8)": True, "grid(20) | tome(r=6) | adavit()": False}  # static?


@pytest.mark.parametrize("setting", TOGETHER)
def test_compositions_train_evaluate_draw_and_export(setting, tmp_path):
    photos = write_folder(tmp_path / "photos", files(each=6))
    AdaptiveViT(make_vit("deit", img_size=224, depth=4, embed_dim=48)).save(str(tmp_path / "source"))
    config = {
        "model": {"name": str(tmp_path / "source")},
        "data": {"path": str(photos), "holdout": 0.0, "workers": 0},
        "sampling": {"settings": [setting]},
        "run": {"steps": 2, "batch": 6, "threads": 1},
    }
    model = training.train(config, out=tmp_path / "run").model
    assert str(model.setting) == setting
    images = make_images(model.vit, 2)
    with torch.no_grad():
        assert relative(load(str(tmp_path / "run" / "model"))(images).logits, model.eval()(images).logits) <= 1e-6
    rows, _ = sweep.evaluate(model, photos, [setting])
    assert {row.setting for row in rows} == {"dense", setting}
    assert rows[1].gmacs < rows[0].gmacs
    picture = tmp_path / "a.png"
    views.view(model, next(photos.rglob("*.png")), setting, out=picture)
    assert picture.stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("setting", [setting for setting, static in TOGETHER.items() if static])
def test_compositions_whose_counts_are_static_export(setting):
    model = AdaptiveViT(make_vit("deit", img_size=224, depth=4, embed_dim=48), setting)
    answer, images = Answer(model), torch.randn(3, 3, 224, 224)
    program = torch.export.export(answer, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        assert relative(program.module()(images)[0], answer(images)[0]) <= 1e-5


def test_keep_rate_and_merge_ratio_are_annealed_as_in_evit():
    """1 for a thirtieth of the training, then half a cosine over a third of it, then as it stays."""
    config = read_config("imagepiece", ["data.path=x"])
    sampler = Sampler(config.sampling, [1.0] * len(config.sampling.settings), 300, seed=0)
    calls = [dict(Setting.parse(text).calls[-1].kwargs) for text in config.sampling.settings]
    keeps, merges = (torch.tensor([float(c.get(k, v)) for c in calls]) for k, v in (("keep", 1.0), ("merge", 0.0)))
    for step in range(300):
        t = min(max((step / 299 - 1 / 30) * 3, 0.0), 1.0)
        done = (1 - math.cos(math.pi * t)) / 2
        weights = torch.from_numpy(sampler.weights(step)).float()
        assert float(weights @ keeps) == pytest.approx(1 - 0.2 * done, abs=0.013)
        assert float(weights @ merges) == pytest.approx(0.08 * done, abs=0.005)
    assert (keeps[-1], merges[-1]) == (pytest.approx(0.8), pytest.approx(0.08))
