"""Settings of every registered name, its hard ones too."""

from __future__ import annotations

import functools

from torch import nn

from oracles import make_vit
from saccade.backbones.vit import backbone_of
from saccade.core.registry import registry
from saccade.model import AdaptiveViT
from saccade.setting import Setting

SHAPE = {"depth": 4, "embed_dim": 96, "num_heads": 6, "img_size": 128}  # 65 tokens


HARD = {
    "evit": [
        "evit(0.5, at=0)",
        "evit(0.5, at=3)",
        "evit(0.6, at=[0, 1, 2, 3])",
        "evit(0.01)",
        "evit(0.3, fuse=True, at=[0, 1])",
        "evit(0.6, fuse=True, score='received')",
    ],
    "tome": [
        "tome(r=1)",
        "tome(r=[0, 20, 0, 4])",
        "tome(r=1000)",
        "tome(r=6, inflection=-1)",
        "tome(speed=1.3, metric='x', proportional=False)",
    ],
    "imagepiece": [
        "imagepiece(p=1, merge=0.5, merge_at=[0, 1, 2, 3])",
        "imagepiece(p=1, merge=0.1, of='first', split='halves', per='patch', merge_at=[0, 1, 2, 3])",
        "imagepiece(p=0.6, merge=0.2, keep=0.6, merge_at=[1, 2], prune_at=[1, 2], weighted=False)",
        "imagepiece(p=0.5, merge=0.1, keep=0.7, metric='x', score='received')",
        "imagepiece(p=0.6, merge=0.4, keep=0.8, of='bottom', split='random', proportional=False, fuse=True)",
    ],
    "token_pooling": [
        "token_pooling(0.5, at=[0, 3], centre='mean')",
        "token_pooling(0.3, at=1, weighted=False, proportional=True)",
    ],
    "dpc_knn": [
        "dpc_knn(0.3, at=3, neighbours=1, proportional=True, weighted=True)",
        "dpc_knn(0.5, at=[0, 2], learned=True)",
    ],
    "tofu": ["tofu(r=[0, 20, 8, 4], merge_from=2)", "tofu(r=1000, merge_from=0)"],
    "pitome": ["pitome(0.5)", "pitome(0.8, metric='x', proportional=True)"],
    "mctf": ["mctf(r=9)", "mctf(r=[0, 9, 0, 4])", "mctf(r=1000, info=1, size=1)"],
    "depth": ["depth(3, head='own')", "depth(1)"],
    "algm": ["algm(0.5, 0, local_at=3)", "algm(1, 0.5, merge_at=0, weighted=False)"],
    "kth": ["kth(3, at=[0, 2], merge=True)", "kth(100, at=1)"],
    "cut": ["cut(30, at=[0, 2], site='block')", "cut([40, 12, 1], at=[0, 1, 3])", "cut(10)"],
    "tokenlearner": ["tokenlearner(6, at=1, version='1.0')", "tokenlearner(1, at=3)", "tokenlearner(8, at=2)"],
    "patchmerger": ["patchmerger(1, at=3)", "patchmerger(20, at=0, scale=0.07)", "patchmerger(12, at=1)"],
    "radial": ["radial(0.5, at=0)", "radial(0.02, at=[1, 3], norm='linf')", "radial(0.4, norm='l1')"],
    "diffrate": [
        "diffrate([0, 5, 0, 3], [2, 0, 30, 0])",
        "diffrate(0, 9, metric='x')",
        "diffrate(1000, 3, score='received')",
    ],
    "dynamicvit": ["dynamicvit(0.5, at=[0, 3])", "dynamicvit(0.5, threshold=0.95)", "dynamicvit(0.3)"],
    "adavit": [
        "adavit(threshold=0.98)",
        "adavit(0.5, axes=('patch', 'block'), at=[0, 1, 2, 3], threshold=0.98)",
        "adavit(share=0.5, threshold=0.97, heads='partial')",
        "adavit(axes=('patch', 'head'), at=[0, 2], form='released', threshold=0.5)",
    ],
    "ats": ["ats(0.5, at=[0, 3])", "ats(0.1, at=1, score='received', levels='code')"],
    "avit": ["avit(gamma=1, beta=-2)", "avit(at=[2, 3], gamma=0.5, beta=0.5)", "avit(gamma=1, beta=-0.5)"],
    "ltmp": [
        "ltmp(0.5, at=[0, 1], start=0.9, merge=None)",
        "ltmp(0.6, at=1, weight=0.0, start=1.0, merge=0.2)",
        "ltmp(start=0.6, merge=0.7)",
    ],
    "topk": ["topk(0.3, at=[0, 1, 2, 3], asks='mean')", "topk((0.7, 0.01), at=(1, 2))", "topk(0.5)"],
    "random_plus": ["random_plus(0.6, axes='patch', at=[0, 3])", "random_plus(0.5, seed=3)", "random_plus(0.6)"],
    "random": ["random(0.5, at=0)", "random(0.02, at=[1, 3])", "random(0.6, seed=7)"],
    "grid": [
        "grid(8)",
        "grid((8, 32))",
        "grid(20, fit='pad')",
        "grid(16, stride=12)",
        "grid(24, 100, fit='crop')",
        "grid(32, resize='google')",
    ],
    "quadtree": [
        "quadtree(4, size=128)",
        "quadtree(31, scorer='entropy', size=128, resample='bilinear')",
        "quadtree(94, sizes=(8, 16, 32, 64), size=128)",
        "quadtree(threshold=7.7)",
        "quadtree(31, scorer='attention(2)', size=128)",
        "quadtree(40, size=128, positions='centre', area_bias=True, size_embedding=True)",
    ],
    "stem": ["stem(20)", "stem((32, 16), size=96)", "stem()"],
}


@functools.cache  # asked some hundred times before the first test runs, each time of a new model
def menu_of(name: str, family: str = "deit", **shape) -> tuple[str, ...]:
    return tuple(registry()[name].menu(backbone_of(make_vit(family, **(shape or SHAPE)))))


def settings_of(name: str) -> list[str]:
    """Both ends and the middle of a method's menu, and its harder settings."""
    menu = menu_of(name)
    some = [*menu[:1], *menu[len(menu) // 2 : len(menu) // 2 + 1], *menu[-1:], *HARD.get(name, [name])]
    return list(dict.fromkeys(str(Setting.parse(text)) for text in some))


@functools.cache
def learns(text: str) -> bool:
    """Whether something of a setting is trained and saved."""
    return bool(AdaptiveViT(_deit(), text).learned)


@functools.cache
def _deit() -> nn.Module:
    return make_vit("deit", **SHAPE)
