"""From photos to answers: every kind of input gives the same answer, in order; what cannot be read is named."""

from __future__ import annotations

import csv
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

import saccade
from data_helpers import encode, picture, write_folder
from saccade.cli import main
from saccade.data.classes import Classes
from saccade.errors import UserError

NAMES = ["ant", "n01440764", "cat"]


def small(setting: str = "", **changes) -> saccade.AdaptiveViT:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 3}
    return saccade.create_model("vit_tiny_patch16_224", setting, **{**sizes, **changes}).eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("predict")
    model = small("tome(r=2)")
    model.vit.pretrained_cfg = {**model.vit.pretrained_cfg, "label_names": NAMES}
    model.save(root / "model")
    photos = {f"{name}.png": encode(picture(70 + i, 90, i)) for i, name in enumerate("abc")}
    write_folder(root / "photos", {**photos, "deep/er/d.png": encode(picture(64, 64, 7)), "notes.txt": b"no image"})
    write_folder(root / "mixed", {"a.png": photos["a.png"], "b.png": b"broken", "c.png": photos["c.png"]})
    with ZipFile(root / "photos.zip", "w") as file:
        for name, data in photos.items():
            file.writestr(name, data)
    return root


@pytest.fixture(scope="module")
def predictor(place) -> saccade.Predictor:
    return saccade.Predictor(place / "model", batch=2)


def same(found, expected) -> None:
    assert found.indices == expected.indices
    assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
    assert np.allclose(found.embedding, expected.embedding, atol=1e-4)
    assert np.array_equal(found.owner, expected.owner) and found.macs == expected.macs


def test_an_answer_is_what_the_model_says(place, predictor):
    (found,) = predictor(place / "photos" / "a.png")
    model = saccade.load(place / "model")
    prepare = saccade.data.Preprocess.of(model.vit)
    out = model(prepare(Image.open(place / "photos" / "a.png").convert("RGB")).unsqueeze(0))
    shares = out.softmax(-1)[0]
    order = shares.argsort(descending=True).tolist()
    assert list(found.indices) == order
    assert found.probabilities == pytest.approx(shares[order].tolist(), abs=1e-5)
    assert found.classes == tuple(NAMES[i] for i in order)
    assert found.label == {"n01440764": "tench"}.get(found.classes[0], found.classes[0])
    assert found.macs == out.trace.macs().item()
    assert np.array_equal(found.owner.reshape(-1), out.trace.blocks[-1].owner[0].numpy())
    head = model.vit.head
    logits = torch.from_numpy(found.embedding) @ head.weight.T + head.bias
    assert torch.allclose(logits, out.logits[0], atol=1e-4)
    assert found.token_map(128).size[0] >= 64 and found.error is None


def test_every_kind_of_input_gives_the_same(place, predictor):
    file = place / "photos" / "a.png"
    (expected,) = predictor(file)
    image = Image.open(file)
    array = np.asarray(image.convert("RGB"))
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = [
        str(file), image, array, array / 255.0, (array / 255.0).astype(np.float32), tensor, tensor.float() / 255,
        array[None], tensor[None], file.read_bytes(), [file], iter([image]), (x for x in [array]), [[tensor]],
        np.dstack([array, array[..., :1]]), str(place / "photos" / "[a].png"),
    ]  # fmt: skip
    for kind in kinds:
        (found,) = predictor(kind)
        same(found, expected)
    grey = array[..., 0]
    same(predictor(grey)[0], predictor(np.dstack([grey] * 3))[0])
    assert image.size == Image.open(file).size  # what is given is not changed


def test_batches_and_order(place, predictor):
    photos = [place / "photos" / f"{name}.png" for name in "abc"]
    single = [predictor(photo)[0] for photo in photos]
    for given in (place / "photos.zip", str(place / "photos" / "*.png"), photos, iter(photos)):
        for found, expected in zip(predictor(given), single, strict=True):
            same(found, expected)
    stack = np.stack([np.asarray(picture(64, 64, i)) for i in range(5)])
    found = predictor(stack)
    assert [p.name for p in found] == [f"image {i}" for i in range(5)]
    assert found.embeddings.shape == (5, 48)
    below = predictor(place / "photos")
    assert [Path(p.name).name for p in below] == ["a.png", "b.png", "c.png", "d.png"]  # at any depth


def test_a_broken_image_is_named_where_it_stood(place, predictor):
    found = predictor(place / "mixed")
    assert [p.error is None for p in found] == [True, False, True]
    assert found.failures == {str(place / "mixed" / "b.png"): found[1].error} and "not a readable" in found[1].error
    assert found[1].labels == () and found[1].embedding is None and found[1].macs is None
    same(found[2], predictor(place / "mixed" / "c.png")[0])
    assert found.embeddings.shape == (2, 48)
    with pytest.raises(ValueError, match="has no tokens"):
        found[1].token_map()
    given = [place / "photos" / "a.png", place / "nothing.png", np.full((8, 8, 3), 200.0), np.full((8, 8, 3), np.nan),
             torch.randn(3, 8, 8), np.zeros((0, 8, 3), np.uint8), place / "photos" / "b.png"]  # fmt: skip
    found = predictor(given)
    reasons = [p.error or "" for p in found]
    assert [bool(reason) for reason in reasons] == [False, True, True, True, True, True, False]
    assert "divide by 255" in reasons[2] and "normalised" in reasons[4] and "no pixels" in reasons[5]
    assert [p.name for p in found][2:6] == [f"image {i}" for i in range(2, 6)]


@pytest.mark.parametrize(
    "given, said",
    [
        ("nothing.jpg", "does not exist"),
        ("nothing*.jpg", "no file fits"),
        ("https://example.org/a.jpg", "download it first"),
        (3, "a int is no image"),
        ({"a": 1}, "a dict is no image"),
        (np.zeros((3, 64, 64), np.uint8), "channels last"),
        (np.zeros((4, 4, 3), np.int64), "give uint8"),
        (torch.zeros(64, 64, 3), "give [3, h, w]"),
        ([[["nothing", None]]], "a NoneType is no image"),
    ],
)
def test_what_is_no_image_is_refused(predictor, given, said):
    with pytest.raises(UserError) as refused:
        predictor(given)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_an_empty_folder_is_refused(predictor, tmp_path):
    with pytest.raises(UserError, match="no images in"):
        predictor(tmp_path)


def test_results(place, predictor):
    found = predictor(place / "mixed")
    assert len(found.rows) == 3 and found.rows[1]["error"]
    assert found.to_dicts()[0]["probability"] == found[0].probability
    assert "a.png" in repr(found[0]) and found[0].label in repr(found)
    assert "<table>" in found._repr_html_()


def test_threads_agree_with_one(place, predictor):
    given = [place / "photos" / f"{name}.png" for name in "abcabc"]
    expected = predictor(given)
    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(predictor, [given] * 12):
            for one, other in zip(found, expected, strict=True):
                same(one, other)


def test_it_streams(place, predictor):
    taken = []

    def photos():
        for i in range(50):
            taken.append(i)
            yield place / "photos" / "a.png"

    first = next(predictor.stream(photos()))
    assert first.label and len(taken) < 10


@pytest.mark.parametrize("setting", ["dense", "evit(0.5)", "ats(at=1)", "quadtree(7)", "depth(2)"])
def test_settings(place, setting):
    found = saccade.predict(place / "model", place / "photos", setting)
    assert all(p.error is None and p.owner.shape == (4, 4) for p in found)


def test_sources(place, tmp_path):
    model = saccade.load(place / "model")
    expected = saccade.predict(place / "model", place / "photos")
    for given in (model, str(place / "model"), saccade.Predictor(model)):
        for one, other in zip(saccade.predict(given, place / "photos"), expected, strict=True):
            same(one, other)
    without = saccade.predict(small(num_classes=0), place / "photos")
    assert without[0].labels == () and without[0].embedding.shape == (48,)
    assert without[0].line() == f"{without[0].name}: an embedding of 48 numbers"
    assert without[0].to_dict().keys() == {"image", "embedding", "gmacs"}
    with pytest.raises(UserError, match="would have random weights"):
        saccade.Predictor("vit_tiny_patch16_224")
    with pytest.raises(UserError, match="batch=0"):
        saccade.Predictor(model, batch=0)


@pytest.mark.parametrize("runner", ["bf16", "fp32 compiled"])
def test_a_folder_runs_as_it_recommends(place, tmp_path, monkeypatch, runner):
    expected = saccade.predict(place / "model", place / "photos")
    saccade.load(place / "model").deploy(runner).save(tmp_path / "model")
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)  # what is compiled is another test's
    predictor = saccade.Predictor(tmp_path / "model", batch=2)
    assert str(predictor.model.deployed) == runner
    for found, other in zip(predictor(place / "photos"), expected, strict=True):
        assert found.probabilities == pytest.approx([dict(zip(other.indices, other.probabilities, strict=True))[i]
                                                     for i in found.indices], abs=0.02)  # fmt: skip
        assert found.macs == other.macs and np.allclose(found.embedding, other.embedding, atol=0.1)
        assert (found.known is None) is ("compiled" in runner)  # then it is looked for when it is asked for
    rows, _ = saccade.eval(tmp_path / "model", place / "photos.zip", ["evit(0.5)"])  # what measures says how it runs
    assert rows[0].agreement.mean == 1.0


def test_names_in_words():
    vit = small().vit
    assert Classes.of(vit).words == ("0", "1", "2")
    vit.pretrained_cfg = {**vit.pretrained_cfg, "label_names": ["n02012849", "n03126707", "x"]}
    assert len({*Classes.of(vit).words}) == 3  # two cranes, told apart by all that they are called
    vit.pretrained_cfg = {**vit.pretrained_cfg, "label_descriptions": {"x": "ex, y", "n02012849": "bird"}}
    assert Classes.of(vit).words == ("bird", "crane", "ex")


# The command


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["predict", *map(str, arguments)])
    return end.value.code or 0, *capsys.readouterr()


def test_in_a_pipe_every_line_is_json(place, capsys):
    for more in ([], ["--json"]):
        code, out, err = run(capsys, place / "model", place / "mixed", "--top", 2, *more)
        assert code == 0 and "1 of 3 images could not be read" in err
        rows = [json.loads(line) for line in out.splitlines()]
        assert [Path(row["image"]).name for row in rows] == ["a.png", "b.png", "c.png"]
        assert len(rows[0]["predictions"]) == 2 and rows[0]["gmacs"] > 0 and "error" in rows[1]


def test_json_of_an_encoder_holds_its_embeddings(place, tmp_path, capsys):
    encoder = small("tome(r=2)", num_classes=0)
    encoder.save(tmp_path / "model")
    code, out, _ = run(capsys, tmp_path / "model", place / "mixed", "--json")
    found, broken, _ = map(json.loads, out.splitlines())
    (expected,) = saccade.predict(encoder, place / "mixed" / "a.png")
    assert code == 0 and found.keys() == {"image", "embedding", "gmacs"} and "error" in broken
    assert np.allclose(found["embedding"], expected.details.embedding, atol=1e-5) and len(found["embedding"]) == 48


def test_csv_of_an_encoder_holds_its_embeddings(place, tmp_path, capsys):
    encoder = small("tome(r=2)", num_classes=0)
    encoder.save(tmp_path / "model")
    order = [place / "mixed" / f"{name}.png" for name in "bac"]  # what cannot be read comes first
    code, out, _ = run(capsys, tmp_path / "model", *order, "--csv", "--out", tmp_path / "out")
    heading, broken, *rows = csv.reader(io.StringIO(out))
    assert code == 0 and heading[:4] == ["image", "gmacs", "error", "embedding_0"] and len(heading) == 3 + 48
    assert broken[0].endswith("b.png") and broken[2] and not any(broken[3:])
    expected = np.stack([p.embedding for p in saccade.predict(encoder, order[1:])])
    assert np.allclose(np.array([row[3:] for row in rows], dtype=float), expected, atol=1e-5)
    assert run(capsys, tmp_path / "model", *order, "--out", tmp_path / "out")[0] == 0  # known as ours, written again


def test_on_a_terminal_a_line_is_an_image(place, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(place)
    code, out, _ = run(capsys, "model", "mixed/a.png", "mixed/b.png")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 2 and all(len(line) <= 80 or "readable" in line for line in lines)
    assert (
        lines[0].startswith("mixed/a.png: ") and "%" in lines[0] and lines[1].startswith("mixed/b.png: not a readable")
    )


def test_as_csv_and_files(place, capsys, tmp_path):
    named = [place / "mixed", "--csv", "--top", 2, "--out", tmp_path / "out"]
    code, out, _ = run(capsys, place / "model", *named, "--embed", tmp_path / "e.npz")
    rows = [*csv.DictReader(io.StringIO(out))]
    assert code == 0 and [bool(row["error"]) for row in rows] == [False, True, False]
    assert float(rows[0]["probability"]) >= float(rows[0]["probability_2"])
    assert (tmp_path / "out" / "predictions.csv").read_text() == out
    assert sorted(p.name for p in (tmp_path / "out" / "tokens").iterdir()) == ["a.png.png", "c.png.png"]
    held = np.load(tmp_path / "e.npz", allow_pickle=False)
    assert held["embedding"].shape == (2, 48) and [Path(n).name for n in held["names"]] == ["a.png", "c.png"]
    code, _, _ = run(capsys, place / "model", place / "mixed", "--embed", tmp_path / "e.safetensors")
    assert np.array_equal(load_file(tmp_path / "e.safetensors")["embedding"], held["embedding"])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["mixed/b.png"], "no image could be read"),
        (["nothing.png"], "does not exist"),
        (["mixed", "--json", "--csv"], "one of --json and --csv"),
        (["mixed", "--embed", "e.pt"], "ends in .npz or .safetensors"),
        (["mixed", "-s", "tomme(r=2)"], "did you mean 'tome'"),
    ],
)
def test_mistakes(place, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(place)
    code, _, err = run(capsys, "model", *arguments)
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_real_photos_have_their_names(data_dir):
    predictor = saccade.Predictor("vit_tiny_patch16_224", weights=data_dir / "vit_tiny_patch16_224.safetensors")
    found = [p for p, _ in zip(predictor.stream(data_dir / "photos50.zip"), range(12), strict=False)]
    right = sum(p.classes[0] == Path(p.name).parent.name for p in found)
    assert right >= 8 and found[0].label == "tench"
