"""A plan, lowered: which blocks stand together, and what each step knows."""

from __future__ import annotations

import pytest

from oracles import make_vit
from saccade.core.program import lower, runs
from saccade.model import AdaptiveViT

TOGETHER = [
    ("dense", True, [[0, 1, 2, 3, 4]]),
    ("dense", False, [[0, 1, 2, 3], [4]]),  # of the last block only the prefix is wanted
    ("evit(0.7, at=2)", True, [[0, 1], [2], [3, 4]]),
    ("evit(0.7, at=(1, 2))", False, [[0], [1], [2], [3], [4]]),
    ("adavit(0.7)", True, [[0], [1], [2], [3], [4]]),
    ("depth(3)", False, [[0, 1], [2]]),
]


@pytest.mark.parametrize(("setting", "whole", "expected"), TOGETHER)
def test_blocks_without_a_method_stand_together(setting, whole, expected):
    vit = make_vit("vit", depth=5)
    steps = lower(vit, AdaptiveViT(vit, setting).plan, whole=whole, masked=False)
    assert [[step.index for step in some] for some in runs(steps)] == expected
    assert [step.block for step in steps] == list(vit.blocks)[: len(steps)]
    assert [step.prefix_only for step in steps] == [not whole and i == len(steps) - 1 for i in range(len(steps))]
