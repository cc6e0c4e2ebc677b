"""Images with texts: reading pairs, the text tower, both losses, zero-shot classes, retrieval, saving."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import saccade
from data_helpers import encode, picture, write_folder, write_zip
from saccade.data import open_images
from saccade.errors import UserError
from saccade.tasks.image_text.image_text_data import captioned, open_pairs, prompts, readable
from saccade.tasks.image_text.image_text_task import shared
from saccade.tasks.image_text.text_tower import (
    END,
    PAD,
    Learned,
    TextTable,
    TextTower,
    open_texts,
    read_table,
    save_table,
    tokenise,
)
from saccade.tasks.image_text.two_tower import LOSSES, Space, TwoTowerHead, by_sigmoid, by_softmax
from saccade.tasks.image_text.zero_shot import belonging, ranks, retrieval, zero_shot
from saccade.training.config import read_config
from saccade.training.task import open_task

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}


def tiny(setting: str = "", *, project: bool = True, loss: str = "sigmoid", out: int = 16) -> saccade.AdaptiveViT:
    torch.manual_seed(0)
    vit = saccade.create_model("vit_tiny_patch16_224", num_classes=0, **TINY).vit
    space = Space(TextTower(out, width=16, depth=2, heads=2, length=40), 32, project=project, loss=loss)
    return saccade.AdaptiveViT(vit, setting, head=TwoTowerHead(space)).eval()


# Pairs


def images(*names: str) -> dict[str, bytes]:
    return {name: encode(picture(seed=i)) for i, name in enumerate(names)}


@pytest.mark.parametrize("packed", [False, True])
def test_texts_lie_beside_their_images(tmp_path: Path, packed: bool) -> None:
    files = {
        **images("a.png", "sub/b.png", "c.png", "empty.png"),
        "a.txt": b"one\n\n two \n",
        "sub/b.txt": "a café".encode(),
        "empty.txt": b" \n",
        "lonely.txt": b"no image",
    }
    path = write_zip(tmp_path / "p.zip", files) if packed else write_folder(tmp_path / "p", files)
    pairs = open_pairs(path)
    assert pairs.images.names == ["a.png", "sub/b.png"]
    assert pairs.texts == [("one", "two"), ("a café",)]
    assert pairs.alone == ["c.png", "empty.png"]
    assert pairs.images.read(1).size == (40, 30)
    assert pairs.subset([1]).texts == [("a café",)] and pairs.subset([1]).images.names == ["sub/b.png"]


def table_text(kind: str) -> str:
    rows = [("x/a.png", "a cat, asleep"), ("x/b.png", "a dog"), ("x/a.png", "the same cat"), ("x/c.png", "")]
    if kind == "jsonl":
        lines = [json.dumps({"file_name": n, "caption": t}) for n, t in rows[:3]]
        return "\n".join([*lines, json.dumps({"file_name": "x/c.png", "caption": []})]) + "\n\n"
    mark = "," if kind == "csv" else "\t"
    return "\n".join([mark.join(("id", "Image", "Text")), *(f'7{mark}{n}{mark}"{t}"' for n, t in rows)])


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("where", ["beside", "folder", "zip"])
def test_tables_of_images_and_texts(tmp_path: Path, kind: str, where: str) -> None:
    files = images("x/a.png", "x/b.png")
    table = tmp_path / f"t.{kind}"
    table.write_text(table_text(kind), encoding="utf-8-sig")
    home = {"beside": tmp_path, "folder": tmp_path / "else", "zip": tmp_path / "i.zip"}[where]
    (write_zip if where == "zip" else write_folder)(home, files)
    pairs = open_pairs(table, None if where == "beside" else home)
    assert dict(zip(pairs.images.names, pairs.texts, strict=True)) == {
        "x/a.png": ("a cat, asleep", "the same cat"),
        "x/b.png": ("a dog",),
    }
    assert pairs.alone == ["x/c.png"]
    assert pairs.images.read(1).size == (40, 30)


def test_bad_pairs_are_one_line(tmp_path: Path) -> None:
    write_folder(tmp_path, images("a.png"))
    cases = {
        "w.csv": ("name,text\na.png,x\n", "columns name, text: one must be called image"),
        "o.csv": ("image,text\n../a.png,x\n", "lists ../a.png: names must lie below"),
        "z.csv": ("image,text\n/etc/passwd,x\n", "lists /etc/passwd"),
        "n.csv": ("image,text\nb.png,x\n", "'b.png' of .* is not in"),
        "e.csv": ("image,text\n", "lists no images"),
        "l.jsonl": ("[1]\n", "row 1 is no object"),
        "j.jsonl": ("{\n", "no table"),
        "t.jsonl": ('{"image": "a.png", "text": 3}\n', "row 1 has no name and text"),
    }
    for name, (text, said) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=said) as error:
            open_pairs(tmp_path / name)
        assert "\n" not in str(error.value)
    for path, said in ((tmp_path / "no.csv", "cannot read"), (tmp_path, "no image in"), (tmp_path / "x", "neither")):
        with pytest.raises(UserError, match=said):
            open_pairs(path)
    write_folder(tmp_path, {"a.txt": b"x" * 70_000})
    with pytest.raises(UserError, match="limit 65,536"):
        open_pairs(tmp_path)


def test_captions_from_classes(tmp_path: Path) -> None:
    found = open_images(write_folder(tmp_path, images("sea_horse/1.png", "cup/1.png")))
    pairs = captioned(found, ["a photo of a {}.", "{}"])
    assert pairs.texts == [("a photo of a cup.", "cup"), ("a photo of a sea horse.", "sea horse")]
    assert readable(["n01440764", "n02102040"]) == ["tench", "English springer"]
    for wrong in ((), ("a photo",), ("{} {}",)):
        with pytest.raises(UserError, match="template"):
            prompts("cup", wrong)
    with pytest.raises(UserError, match="no classes"):
        captioned(open_images(write_folder(tmp_path / "flat", images("1.png"))))


# Texts


def test_tokens_are_bytes() -> None:
    tokens = tokenise(["ab", "", "é", "abcdefgh"], 6)
    assert tokens.tolist() == [
        [97, 98, END, PAD, PAD, PAD],
        [END, PAD, PAD, PAD, PAD, PAD],
        [0xC3, 0xA9, END, PAD, PAD, PAD],
        [97, 98, 99, 100, 101, END],
    ]
    assert tokenise([], 6).shape == (0, 1)
    assert tokenise(["\ud800"], 6).shape == (1, 4)  # half a surrogate, as JSON may hold, is no crash


def test_a_text_is_the_same_in_any_company() -> None:
    tower = TextTower(8, width=16, depth=2, heads=2, length=20).eval()
    texts = ["cat", "", "a much longer text", "über"]
    together = tower.encode(texts)
    for i, text in enumerate(texts):
        assert torch.allclose(tower.encode([text])[0], together[i], atol=1e-6)
    assert (together[0] - together[3]).abs().max() > 1e-3
    order = tower.encode(["tac"])[0]
    assert (order - together[0]).abs().max() > 1e-5  # where a byte stands matters


def test_a_table_of_embeddings(tmp_path: Path) -> None:
    table = torch.randn(3, 5)
    save_table(tmp_path / "t.safetensors", ["a", "b", "c"], table)
    texts, read = read_table(tmp_path / "t.safetensors")
    assert texts == ["a", "b", "c"] and torch.equal(read, table)
    module = TextTable(texts, read, 7)
    assert torch.equal(module.encode(["c", "a"]), module.head(table[[2, 0]]))
    with pytest.raises(UserError, match="no embedding for the text 'd'"):
        module.encode(["a", "d"])
    with pytest.raises(UserError, match="2 are different"):
        TextTable(["a", "a", "b"], table, 7)
    from safetensors.torch import save_file

    save_file({"other": table}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no table of texts"):
        read_table(tmp_path / "x.safetensors")


def test_towers_are_rebuilt_from_what_they_say() -> None:
    made = [
        TextTower(8, width=16, depth=1, heads=4, length=9),
        TextTable(["a", "b"], torch.randn(2, 3), 4),
        Learned(["a", "b"], 4),
    ]
    for module in made:
        again = open_texts(json.loads(json.dumps(module.describe())))
        again.load_state_dict(module.state_dict(), strict=True)
        assert torch.equal(again.eval().encode(["a", "b"]), module.eval().encode(["a", "b"]))


@pytest.mark.parametrize(
    "described",
    [
        {},
        {"kind": "bytes"},
        {"kind": "bytes", "out": 8, "depth": 10**9},
        {"kind": "bytes", "out": 8, "depth": "2"},
        {"kind": "bytes", "out": 8, "width": 10, "heads": 3},
        {"kind": "bytes", "out": 8, "weights": "http://example.org"},
        {"kind": "bytes", "out": 10**9},
        {"kind": "table", "out": 8, "in": 3, "texts": "ab"},
        {"kind": "table", "out": 8, "in": 10**9, "texts": ["a"]},
        {"kind": "learned", "out": 8, "texts": ["a", "a"]},
        {"kind": "pickle", "out": 8},
    ],
)
def test_a_wrong_description_is_refused(described: dict) -> None:
    with pytest.raises(UserError) as error:
        open_texts(described)
    assert "\n" not in str(error.value)


# Losses


def softmax_oracle(logits: Tensor) -> float:
    n, total = len(logits), 0.0
    for i in range(n):
        rows, columns = logits[i].tolist(), logits[:, i].tolist()
        for values in (rows, columns):
            total += math.log(sum(math.exp(v) for v in values)) - values[i]
    return total / 2


def sigmoid_oracle(logits: Tensor) -> float:
    n = len(logits)
    signs = [[1 if i == j else -1 for j in range(n)] for i in range(n)]
    return sum(math.log1p(math.exp(-signs[i][j] * logits[i, j].item())) for i in range(n) for j in range(n))


@pytest.mark.parametrize(("loss", "oracle"), [(by_softmax, softmax_oracle), (by_sigmoid, sigmoid_oracle)])
def test_losses_equal_their_formulas(loss, oracle) -> None:
    logits = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert loss(logits, torch.eye(5, dtype=torch.bool)).item() == pytest.approx(oracle(logits), rel=1e-9)


@pytest.mark.parametrize("loss", [by_softmax, by_sigmoid])
def test_equal_texts_are_no_wrong_answers(loss) -> None:
    """Two images with one text: where every pair is as it should be nothing pulls, but for the naive diagonal."""
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    pulls = []
    for truth in (same, torch.eye(3).bool()):
        right = torch.where(same, 20.0, -20.0).requires_grad_()
        loss(right, truth).backward()
        pulls.append(right.grad.abs().max().item())
    assert pulls[0] < 1e-6 and pulls[1] > 0.4


def test_starts_are_the_papers() -> None:
    for name, (scale, shift) in {"softmax": (1 / 0.07, 0.0), "sigmoid": (10.0, -10.0)}.items():
        space = Space(TextTower(8, width=8, depth=1, heads=1), 8, project=False, loss=name)
        assert space.log_scale.exp().item() == pytest.approx(scale) and space.shift.item() == shift
        x, y = F.normalize(torch.randn(4, 8), dim=-1), F.normalize(torch.randn(4, 8), dim=-1)
        same = torch.eye(4).bool()
        oracle = LOSSES[name].of(scale * x @ y.T + shift, same)
        assert space.compare(x, y, same).item() == pytest.approx(oracle.item(), rel=1e-5)
        with torch.no_grad():
            space.log_scale.fill_(50.0)
        assert torch.isfinite(space.compare(x, y, same))  # CLIP's limit
    with pytest.raises(UserError, match="did you mean 'sigmoid'"):
        Space(TextTower(8, width=8, depth=1, heads=1), 8, project=False, loss="sigmoidd")
    with pytest.raises(UserError, match="texts have 8 numbers and images 9"):
        Space(TextTower(8, width=8, depth=1, heads=1), 9, project=False)


# The model


def test_both_towers_reach_one_sphere_under_any_setting() -> None:
    model, x = tiny(), torch.randn(3, 3, 32, 32)
    for setting in ("dense", "grid(16)", "tome(r=2)", "evit(0.5)"):
        out = model.at(setting).eval()(x)
        assert out.embedding.shape == (3, 16) and torch.allclose(out.embedding.norm(dim=1), torch.ones(3), atol=1e-5)
        assert out.trace.macs().shape == (3,)
    assert model.task_head.words(["a", "b"]).norm(dim=1).sub(1).abs().max() < 1e-5
    assert model.at("grid(16)").task_head.space is model.task_head.space and model.at("grid(16)").vit is model.vit


def test_without_a_projection_the_image_tower_is_as_it_was() -> None:
    model, x = tiny(project=False, out=32), torch.randn(2, 3, 32, 32)
    pooled = model.vit.forward_head(model.vit.forward_features(x))
    assert torch.allclose(model(x).embedding, F.normalize(pooled, dim=-1), atol=1e-6)
    with pytest.raises(UserError, match="still has a classifier of 5"):
        vit = saccade.create_model("vit_tiny_patch16_224", num_classes=5, **TINY).vit
        saccade.AdaptiveViT(vit, head=model.task_head)


@pytest.mark.parametrize(("project", "loss"), [(True, "softmax"), (False, "sigmoid")])
def test_saved_and_loaded_it_says_the_same(tmp_path: Path, project: bool, loss: str) -> None:
    model, x = tiny("grid(16)", project=project, loss=loss, out=16 if project else 32), torch.randn(2, 3, 32, 32)
    saccade.save(model, tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    again = saccade.load(tmp_path / "m")
    assert str(again.setting) == "grid(16)" and TwoTowerHead.of(again).space.loss == loss
    assert torch.equal(again(x).embedding, model(x).embedding)
    assert torch.equal(again.task_head.words(["a cup"]), model.task_head.words(["a cup"]))
    assert torch.equal(saccade.load(tmp_path / "m", "dense")(x).embedding, model.at("dense")(x).embedding)


def test_a_damaged_folder_is_one_line(tmp_path: Path) -> None:
    saccade.save(tiny(), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    text = json.dumps(config)
    for old, new in (('"depth": 2, "heads": 2', '"depth": 3, "heads": 2'), ('"kind": "bytes"', '"kind": "code"')):
        assert old in text
        (tmp_path / "m" / "config.json").write_text(text.replace(old, new))
        with pytest.raises(UserError) as error:
            saccade.load(tmp_path / "m")
        assert "\n" not in str(error.value)


# What it can be asked


def test_ranks_are_counted_against_ties() -> None:
    g = torch.Generator().manual_seed(0)
    asking, among = torch.randn(300, 4, generator=g).round(), torch.randn(40, 4, generator=g).round()
    own = torch.rand(300, 40, generator=g) < 0.05
    own[torch.arange(300), torch.randint(40, (300,), generator=g)] = True
    oracle = []
    for i in range(300):
        near = [(asking[i] * row).sum().item() for row in among]
        best = max(n for n, mine in zip(near, own[i].tolist(), strict=True) if mine)
        oracle.append(sum(n >= best for n, mine in zip(near, own[i].tolist(), strict=True) if not mine))
    assert ranks(asking, among, own).tolist() == oracle
    assert (ranks(torch.zeros(4, 2), torch.zeros(9, 2), torch.eye(4, 9).bool()) == 8).all()  # saying nothing finds none
    texts, own = belonging([("a", "b"), ("b",), ("c", "a")])
    assert texts == ["a", "b", "c"] and own.int().tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    from PIL import Image

    colours = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
    files = {
        f"{name}/{i}.png": encode(Image.new("RGB", (36, 36), tuple(c + 3 * i for c in rgb)))
        for name, rgb in colours.items()
        for i in range(8)
    }
    return write_folder(tmp_path / "colours", files)


def test_towers_learn_to_find_each_other(coloured: Path) -> None:
    """A locked random ViT, a text tower trained on three colours: zero-shot and retrieval know them, and before not."""
    images = open_images(coloured)
    pairs = captioned(images)
    model = tiny(loss="softmax")
    (before,), _ = zero_shot(model, images)
    from saccade.data import Loader, Preprocess

    batch = next(Loader(images, Preprocess.of(model.vit)).batches(24))
    with torch.no_grad():
        features = {s: saccade.AdaptiveViT(model.vit, s)(batch.images).logits for s in ("dense", "grid(16)")}
    texts = [pairs.texts[i][0] for i in batch.indices]
    same = torch.tensor([[a == b for a in texts] for b in texts])
    space = model.task_head.space
    optimizer = torch.optim.AdamW(space.parameters(), lr=3e-3)
    for step in range(60):
        x = features["dense" if step % 2 else "grid(16)"]
        loss = space.compare(space.images(x), space.words(texts), same) / len(texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found, failures = zero_shot(model, images, ["grid(16)"])
    assert not failures
    assert [row.setting for row in found] == ["dense", "grid(16)"]
    assert before.top1.mean < 0.7 < 0.95 < min(row.top1.mean for row in found)
    assert found[0].gmacs > found[1].gmacs and found[0].images == 24
    back, _ = retrieval(model, pairs, ["grid(16)"])
    assert back[1].texts == 3 and back[1].text_at_1.mean > 0.95 and back[1].image_at_1.mean > 0.9
    assert json.dumps([row.to_dict() for row in (*found, *back)])
    (unseen,), _ = zero_shot(model, images, names=["red", "green", "no such thing"], limit=6)
    assert unseen.images == 6
    with pytest.raises(UserError, match="2 names for 3 classes"):
        zero_shot(model, images, names=["red", "green"])


# The command


def test_the_command_names_classes_and_finds_pairs(
    coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from saccade.cli import main

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["zeroshot", str(tmp_path / "m"), *arguments])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    saccade.save(tiny(), tmp_path / "m")
    code, out, _ = run(str(coloured), "-s", "grid(16)", "--template", "{}", "--json")
    assert code == 0 and [row["setting"] for row in json.loads(out)["rows"]] == ["dense", "grid(16)"]
    files = {**images("a.png", "b.png"), "a.txt": b"one", "b.txt": b"two", "c.png": b"broken", "c.txt": b"three"}
    write_folder(tmp_path / "p", files)
    code, out, err = run(str(tmp_path / "p"))
    assert code == 0 and "text R@1" in out and "2 images, 2 different texts" in out and "c.png" in err
    for arguments, said in (
        ([str(tmp_path / "p"), "--split", "val"], "neither split nor templates"),
        ([str(tmp_path / "x")], "does not exist"),
        ([str(coloured), "--template", "x"], "template 'x'"),
    ):
        code, _, err = run(*arguments)
        assert code == 2 and err.count("\n") == 1 and said in err, err
    saccade.save(saccade.create_model("vit_tiny_patch16_224", **TINY), tmp_path / "m2")
    with pytest.raises(SystemExit):
        main(["zeroshot", str(tmp_path / "m2"), str(coloured)])
    assert "no two-tower model" in capsys.readouterr().err


# Training


def changes(path: Path, *more: str) -> list[str]:
    args = "model.args={embed_dim=32, depth=2, num_heads=2, patch_size=8, img_size=32}"
    own = [args, f"data.path={path}", "data.workers=0", "run.batch=6", "run.log_every=1", "sampling.settings=['dense',"]
    own[-1] += " 'grid(16)']"
    return [*own, "texts.width=16", "texts.depth=1", "texts.length=40", "run.steps=4", *more]


TEMPLATES = "pairs.templates=['a photo of a {}.', 'the colour {}']"


def test_files_that_are_passed_over_are_noted(tmp_path: Path) -> None:
    write_folder(
        tmp_path / "p", {f"{'ab'[i % 2]}/{i}.png": encode(picture(seed=i)) for i in range(4)} | {"a/x.heic": b""}
    )
    task = open_task(read_config("flexilit", changes(tmp_path / "p", TEMPLATES, "data.holdout=0.5")))
    assert any("passed over 1 .heic" in note for note in task.notes)
    assert task.held is not None and len(task.images) + len(task.held) == 4


def test_a_locked_tower_stays_and_an_open_one_moves(coloured: Path, tmp_path: Path) -> None:
    start = saccade.create_model("vit_tiny_patch16_224", **TINY)
    saccade.save(start, tmp_path / "start")
    common = changes(coloured, TEMPLATES, f"model.name={tmp_path / 'start'}", "model.args={}", "data.holdout=0.3")
    lit = saccade.train("flexilit", common, out=tmp_path / "lit")
    clip = saccade.train("flexiclip", [*common, "pairs.width=8"], out=tmp_path / "clip")
    assert isinstance(lit.model.task_head, TwoTowerHead) and lit.metric == "R@1" and len(lit.checks) == 2
    assert isinstance(lit.model.task_head.space.project, torch.nn.Identity)
    assert clip.model.task_head.words(["red"]).shape == (1, 8) and clip.model.task_head.space.loss == "softmax"
    before = start.vit.state_dict()
    moved = {
        name: [k for k, v in trained.model.vit.state_dict().items() if not torch.equal(v, before[k])]
        for name, trained in (("lit", lit), ("clip", clip))
    }
    assert not moved["lit"] and len(moved["clip"]) > 20
    more = saccade.train("flexiclip", [*common, f"model.name={tmp_path / 'lit' / 'model'}"], out=tmp_path / "more")
    assert more.model.task_head.space.loss == "sigmoid"  # the space that it began with
    assert "recall_at_1" in (tmp_path / "lit" / "checks.csv").read_text().splitlines()[0]


def test_a_run_that_stopped_goes_on_as_if_it_had_not(coloured: Path, tmp_path: Path) -> None:
    common = changes(coloured, TEMPLATES, "data.holdout=0", "run.save_every=2")
    whole = saccade.train("flexiclip", common, out=tmp_path / "whole")
    compare, count = Space.compare, [0]

    def stops(self: Space, *arguments: Tensor) -> Tensor:
        count[0] += 1
        if count[0] == 4:
            raise RuntimeError("pulled out")
        return compare(self, *arguments)

    Space.compare = stops
    try:
        with pytest.raises(RuntimeError, match="pulled out"):
            saccade.train("flexiclip", common, out=tmp_path / "stopped")
    finally:
        Space.compare = compare
    again = saccade.train("flexiclip", common, out=tmp_path / "stopped", resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_pairs_and_tables_of_embeddings_are_trained_on(tmp_path: Path) -> None:
    files = images(*(f"{i}.png" for i in range(8)))
    write_folder(tmp_path / "p", {**files, **{f"{i}.txt": f"number {i}\nthe {i}\n".encode() for i in range(8)}})
    said = [text for i in range(8) for text in (f"number {i}", f"the {i}")]
    save_table(tmp_path / "t.safetensors", said, torch.randn(16, 5))
    more = [f"texts.table={tmp_path / 't.safetensors'}", f"pairs.held={tmp_path / 'p'}"]
    found = saccade.train("flexilit", changes(tmp_path / "p", *more), out=tmp_path / "run")
    assert isinstance(found.model.task_head.space.texts, TextTable) and len(found.checks) == 2
    again = saccade.load(tmp_path / "run" / "model")
    assert torch.equal(again.task_head.words(said), found.model.task_head.words(said))
    with pytest.raises(UserError, match="no embedding for the text"):
        again.task_head.words(["another"])


def test_which_texts_of_a_batch_are_whose() -> None:
    everything = [("a", "b"), ("c",), ("b", "d"), ("c",)]
    chosen = ["a", "c", "b", "c"]
    oracle = [[chosen[j] in everything[i] for j in range(4)] for i in range(4)]
    assert shared(everything, chosen).tolist() == oracle


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("augment.mixup=0.5", "augment.mixup mixes images"),
        ("run.accumulate=2", "run.accumulate > 1"),
        ("data.path=", "no pairs to train on"),
        ("data.path=nowhere", "neither a folder nor a zip"),
        ("pairs.templates=['photo']", "template 'photo'"),
    ],
)
def test_what_cannot_be_trained_is_one_line(coloured: Path, tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        saccade.train("flexilit", changes(coloured, change), out=tmp_path / "run")
    assert "\n" not in str(error.value)
