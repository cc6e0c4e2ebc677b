"""What ``docs/add-a-method.md`` says is run as it stands, and the method it makes keeps the contract."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from oracles import counted_macs, make_images, make_vit, relative
from saccade.core import registry
from saccade.model import AdaptiveViT

PAGE = Path(__file__).parents[1] / "docs" / "add-a-method.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry.registry()))
    scope: dict = {}
    exec(compile(BLOCKS[0], str(PAGE), "exec"), scope)
    return scope


def test_every_block_runs(registered, capsys):
    for block in BLOCKS[1:]:
        exec(compile(block, str(PAGE), "exec"), registered)
    tokens = capsys.readouterr().out.splitlines()[0]
    assert tokens.startswith("[193, 189, 185, "), "merging by 4 from the first block on"


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "deit3", "siglip", "dinov2-registers"])
def test_its_method_keeps_the_contract(registered, family):
    vit = make_vit(family, depth=4)
    images = make_images(vit, 3)
    model = AdaptiveViT(vit, "from_mean(0.5)").eval()
    tokens, trace = model.forward_tokens(images)
    masked, _ = model.forward_tokens(images, sparse=False)
    assert relative(tokens.x, masked.x) <= 1e-5
    assert bool((tokens.area().sum(1) + (tokens.owner < 0).sum(1) == tokens.owner.shape[1]).all())
    counted = counted_macs(lambda: model.forward_tokens(images))
    assert float(trace.macs().sum()) - 3 * trace.head == pytest.approx(counted, rel=1e-3)
    for b in range(3):
        assert relative(model.forward_tokens(images[b : b + 1])[0].x, tokens.x[b : b + 1]) <= 1e-5
    assert torch.equal(model.at("from_mean(1.0)")(images).logits, model.at("")(images).logits)
