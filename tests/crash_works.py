"""What ``crashes.py`` interrupts: how it begins, what is done, and what must hold wherever it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

import saccade
from data_helpers import encode, picture, write_folder
from kills import look
from oracles import make_images, make_vit
from saccade.data import open_images
from saccade.data.decoded import Decoded
from saccade.evaluation import report as publish
from saccade.evaluation import search_run
from saccade.evaluation.candidates import Candidate, Priced, price
from saccade.model import AdaptiveViT
from saccade.storage.files import is_our_picture, write_picture
from saccade.training.checkpoints import newest, read_state
from saccade.training.logging import read_table

Work = tuple[Callable[[], object], Callable[[], object], Callable[[], object]]  # before, the work, after
TINY = {"depth": 1, "embed_dim": 16, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 3}


def logits(model: AdaptiveViT) -> torch.Tensor:
    with torch.no_grad():
        return model(make_images(model.vit)).logits


def litter(folder: Path, *but: str) -> list[str]:
    """Hidden files that are left."""
    return sorted(p.name for p in folder.rglob(".*") if p.name not in but)


def photos(root: Path) -> str:
    files = {f"{'abc'[i % 3]}/{i:02d}.png": encode(picture(40, 36, seed=i)) for i in range(30)}
    return str(write_folder(root.parent / "images", files))


def whole(file: Path) -> str:
    """The text of a file that is there from its beginning to its end."""
    text = file.read_text()
    if file.suffix == ".html":
        assert text.startswith("<!") and text.rstrip().endswith("</html>"), f"{file} is torn"
    if file.suffix == ".json":
        json.loads(text)
    return text


def save_new(root: Path) -> Work:
    """A folder that was not there is the whole new one, or is not there."""
    model, folder = AdaptiveViT(make_vit(**TINY), "tome(r=2)"), root / "m"

    def after() -> None:
        if folder.exists():
            assert torch.equal(logits(saccade.load(folder)), logits(model)), "another model"
        model.save(folder)
        assert not litter(root), litter(root)

    return (lambda: None), (lambda: model.save(folder)), after


def save_over(root: Path) -> Work:
    """A folder that was there is the old or the new model; saving once more cleans up."""
    old, new = (AdaptiveViT(make_vit(seed=i, **TINY), s) for i, s in enumerate(("tome(r=1)", "tome(r=2)")))
    return replaced(root, lambda: old.save(root / "m"), lambda: new.save(root / "m"))


def convert(root: Path) -> Work:
    """The same of ``convert --out``, over a folder that it wrote before."""
    model = AdaptiveViT(make_vit(**TINY))
    return replaced(root, lambda: saccade.convert(model, 4, root / "m"), lambda: saccade.convert(model, 16, root / "m"))


def replaced(root: Path, old: Callable[[], object], new: Callable[[], object]) -> Work:
    folder = root / "m"
    said = []
    for write in (old, new):
        write()
        said.append(logits(saccade.load(folder)))
        shutil.rmtree(folder)

    def before() -> None:
        old()
        (folder / "notes.txt").write_text("mine")

    def after() -> None:
        found = logits(saccade.load(folder))
        assert any(found.shape == s.shape and torch.equal(found, s) for s in said), "a mix of both"
        new()
        assert torch.equal(logits(saccade.load(folder)), said[1])
        assert (folder / "notes.txt").read_text() == "mine" and not litter(root), litter(root)

    return before, new, after


def config(root: Path) -> dict[str, Any]:
    return {
        "model": {"args": {**TINY, "drop_path_rate": 0.1}},
        "sampling": {"settings": ["dense", "evit(0.5, at=(0,))"]},
        "data": {"path": photos(root), "workers": 0, "holdout": 0.2, "check_limit": 4},
        "optim": {"ema": 0.9, "warmup": 0.0},
        "run": {"steps": 3, "batch": 8, "save_every": 1, "log_every": 1, "check_every": 0.7, "threads": 1,
                "device": "cpu"},
    }  # fmt: skip


def same_run(folder: Path, other: Path) -> None:
    """Two runs that ended left the same."""
    ends = [read_state(newest(f / "checkpoints", "last"))[0] for f in (folder, other)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0]), "weights"
    for name, columns in (("metrics.csv", ("step", "loss", "images")), ("checks.csv", ("step", "setting", "gmacs"))):
        rows = [[[row[c] for c in columns] for row in read_table(f / name)] for f in (folder, other)]
        assert rows[0] == rows[1], f"{name}: {rows}"
    assert torch.equal(*(logits(saccade.load(f / "model")) for f in (folder, other)))
    assert not litter(folder), litter(folder)
    assert {p.name for p in folder.iterdir()} == {p.name for p in other.iterdir()}


def train(root: Path) -> Work:
    """Resumed from wherever it ended, a run gives what it gives uninterrupted, its tables too."""
    run, folder, done = config(root), root / "run", root.parent / "whole"
    saccade.train(run, out=done)

    def after() -> None:
        if folder.exists():
            look(folder)
        saccade.train(run, out=folder, resume=True)
        same_run(folder, done)

    return (lambda: None), (lambda: saccade.train(run, out=folder, resume=True)), after


def train_again(root: Path) -> Work:
    """A run that had ended, and is resumed, holds its model all the time."""
    run, folder, done = config(root), root / "run", root.parent / "whole"
    saccade.train(run, out=done)

    def after() -> None:
        assert look(folder) == 3
        assert torch.equal(*(logits(saccade.load(f / "model")) for f in (folder, done)))
        saccade.train(run, out=folder, resume=True)
        same_run(folder, done)

    return (lambda: shutil.copytree(done, folder)), (lambda: saccade.train(run, out=folder, resume=True)), after


def eval_over(root: Path) -> Work:
    """Results of before are there, file by file, or the new ones; what was measured is taken up and gives the same."""
    model, images, folder, done = AdaptiveViT(make_vit(**TINY)), photos(root), root / "out", root.parent / "whole"

    def run(out: Path, *settings: str) -> list[Any]:
        return saccade.eval(model, images, list(settings), out=out, batch=8).rows

    new = ["tome(r=1)", "tome(r=2)"]
    run(done, "tome(r=3)")
    first = root.parent / "first"
    shutil.copytree(done, first)
    expected = run(done, *new)

    def after() -> None:
        for name in ("scores.csv", "scores.json", "report.html"):
            found = whole(folder / name)
            assert found in (whole(first / name), whole(done / name)), f"{name} is neither the old nor the new one"
        assert run(folder, *new) == expected
        assert not litter(folder), litter(folder)

    return (lambda: shutil.copytree(first, folder)), (lambda: run(folder, *new)), after


FEW = {"dense": "dense", "tome(r=1)": "reduction", "tome(r=3)": "reduction"}


def few(model: AdaptiveViT, *_: object) -> Priced:
    """A search among few settings, for its time; all else is as it always is."""
    return Priced([Candidate(s, family, price(model, s), False) for s, family in FEW.items()], {})


def replace(module: ModuleType, name: str, stand_in: Callable[..., object]) -> None:
    """For the rest of this process; a name that has moved away is an error, not a longer test."""
    assert callable(getattr(module, name)), name
    setattr(module, name, stand_in)


def tune_over(root: Path) -> Work:
    """The folder's model is the one of before or the new one, what is said of it is whole; again it goes through."""
    replace(search_run, "candidates", few)
    replace(publish, "_samples", lambda *_: [])  # pictures that cost time and touch no file
    model, images, folder, done = AdaptiveViT(make_vit(**TINY)), photos(root), root / "out", root.parent / "whole"
    files = ("frontier.csv", "frontier.json", "report.html")

    def run(out: Path) -> Any:
        return saccade.tune(model, images, "1.1x", out=out, seconds=0.0, batch=2, compiled=False, schedules=0)

    assert {row.setting.split(" · ")[0] for row in run(done).rows} == set(FEW), "not the short search"
    first = {name: whole(done / name) for name in files}

    def check() -> None:
        found = saccade.load(folder / "model", runner=None)
        assert torch.equal(logits(found), logits(model.at(str(found.setting)))), "a mix of two models"

    def after() -> None:
        check()
        for name in files:
            assert whole(folder / name) == first[name] or len(whole(folder / name)) > 100
        told = run(folder)
        check()
        assert json.loads(whole(folder / "frontier.json"))["verdict"] == told.recommendation
        assert str(saccade.load(folder / "model", runner=None).setting) == told.setting
        assert not litter(folder), litter(folder)

    return (lambda: shutil.copytree(done, folder)), (lambda: run(folder)), after


def decoded(root: Path) -> Work:
    """The file of decoded images is not there, or whole."""
    images = open_images(photos(root))
    expected = [np.asarray(images.read(i)) for i in range(len(images))]

    def make() -> Decoded:
        return Decoded.make(images, 64, root / "cache", workers=1)

    def after() -> None:
        found = make()
        assert all(np.array_equal(found.array(i), expected[i]) for i in range(len(images)))
        assert len(list((root / "cache").iterdir())) == 1, litter(root)

    return (lambda: None), make, after


def pictures(root: Path) -> Work:
    """A picture of ours is the old or the new one."""
    file, sides = root / "a.png", (40, 60)

    def write(side: int) -> None:
        write_picture(file, picture(side, side))

    def after() -> None:
        image = Image.open(file)
        image.load()
        assert image.width in sides and is_our_picture(file)
        write(sides[1])
        assert Image.open(file).width == sides[1] and not litter(root)

    return (lambda: write(sides[0])), (lambda: write(sides[1])), after


WORKS: dict[str, Callable[[Path], Work]] = {
    work.__name__: work
    for work in (save_new, save_over, convert, train, train_again, eval_over, tune_over, decoded, pictures)
}
