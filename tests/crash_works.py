"""What ``crashes.py`` interrupts: how it begins, what is done, and what must hold wherever it stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import saccade
from oracles import make_images, make_vit
from saccade.model import AdaptiveViT

Work = tuple[Callable[[], object], Callable[[], object], Callable[[], object]]  # before, the work, after


def logits(model: AdaptiveViT) -> torch.Tensor:
    with torch.no_grad():
        return model(make_images(model.vit)).logits


def litter(folder: Path, *but: str) -> list[str]:
    """Hidden files that are left."""
    return sorted(p.name for p in folder.rglob(".*") if p.name not in but)


def save_new(root: Path) -> Work:
    """A folder that was not there is the whole new one, or is not there."""
    model, folder = AdaptiveViT(make_vit(), "tome(r=2)"), root / "m"

    def after() -> None:
        if folder.exists():
            assert torch.equal(logits(saccade.load(folder)), logits(model)), "another model"
        model.save(folder)
        assert not litter(root), litter(root)

    return (lambda: None), (lambda: model.save(folder)), after


def save_over(root: Path) -> Work:
    """A folder that was there is the old or the new model; saving once more cleans up."""
    old, new = AdaptiveViT(make_vit(seed=1), "evit(0.5)"), AdaptiveViT(make_vit(seed=2), "tome(r=2)")
    folder = root / "m"
    said = {str(m.setting): logits(m) for m in (old, new)}

    def before() -> None:
        old.save(folder)
        (folder / "notes.txt").write_text("mine")

    def after() -> None:
        found = saccade.load(folder)
        assert torch.equal(logits(found), said[str(found.setting)]), "a mix of both"
        new.save(folder)
        assert torch.equal(logits(saccade.load(folder)), said[str(new.setting)])
        assert (folder / "notes.txt").read_text() == "mine" and not litter(root), litter(root)

    return before, (lambda: new.save(folder)), after


WORKS: dict[str, Callable[[Path], Work]] = {"save_new": save_new, "save_over": save_over}
