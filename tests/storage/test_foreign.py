"""Folders and files that no verb wrote: no output goes into the ones or in the place of the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import saccade
from data_helpers import encode, picture, write_folder
from saccade.cli import main
from saccade.errors import UserError
from saccade.prediction.prediction_files import EmbeddingFile, PredictionFolder
from saccade.storage.foreign import DOCUMENTS, check_not_foreign
from small_runs import files, tiny

KINDS = (".docx", ".pdf", ".txt", ".ipynb", ".csv", ".XLSX", ".heic", ".mp4")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_documents_is_no_place_to_write_in(kind: str, tmp_path: Path) -> None:
    assert kind.lower() in DOCUMENTS
    (tmp_path / f"thesis{kind}").write_bytes(b"mine")
    with pytest.raises(UserError, match=rf"is a folder of documents \(such as 'thesis{kind}'\): give a new folder"):
        check_not_foreign(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        {},
        {".gitkeep": b"", ".notes.txt": b"hidden"},
        {"log.txt": b""},  # as a shell makes it for the output of the very run
        {"run.toml": b"steps = 1", "start.sh": b"saccade", "weights.safetensors": b"x", "README.md": b"# Mine"},
        {"notes.txt": b"mine", "scores.csv": b"setting,top1\ndense,0.5\n"},
        {"notes.txt": b"mine", "config.json": b'{"saccade": {}, "architecture": "vit"}'},
        {"notes.txt": b"mine", "report.html": b'<meta name="generator" content="saccade">'},
    ],
)
def test_empty_folders_and_ours_are(names: dict[str, bytes], tmp_path: Path) -> None:
    write_folder(tmp_path, names)
    check_not_foreign(tmp_path)
    check_not_foreign(tmp_path / "new")


@pytest.mark.parametrize("name", ["scores.csv", "report.html", "config.json"])
def test_a_file_that_only_has_one_of_our_names_does_not_make_a_folder_ours(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path, {"notes.txt": b"mine", name: b"mine too"})
    with pytest.raises(UserError, match="folder of documents"):
        check_not_foreign(tmp_path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("place")
    tiny().save(str(root / "model"))
    write_folder(root / "photos", files(each=7))
    (root / "p.png").write_bytes(encode(picture(64, 64)))
    return root


VERBS = {
    "tune": ("tune", "model", "photos", "--out", "OUT"),
    "eval": ("eval", "model", "photos", "--out", "OUT"),
    "analyze": ("analyze", "model", "photos", "--out", "OUT"),
    "train": ("train", "finetune", "data.path=photos", "model.name=model", "--out", "OUT"),
    "convert": ("convert", "model", "--patch", "8", "--out", "OUT"),
    "stem": ("stem", "model", "photos", "--out", "OUT"),
    "calibrate": ("calibrate", "model", "photos", "-s", "dynamicvit(0.7)", "--gmacs", "1", "--out", "OUT"),
    "calibrate's cache": ("calibrate", "model", "photos", "-s", "dynamicvit(0.7)", "--gmacs", "1", "--cache", "OUT"),
    "predict": ("predict", "model", "p.png", "--out", "OUT"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_writes_into_a_folder_of_documents(
    verb: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(place)
    (tmp_path / "thesis.docx").write_bytes(b"mine")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path) if part == "OUT" else part for part in VERBS[verb]])
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "is a folder of documents" in said, said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.docx"]


def test_a_cache_is_no_input_and_no_folder_of_photos(place: Path) -> None:
    for cache, said in (
        (place / "photos", "is what is read"),
        (place / "photos" / "c", "is within"),
        (place / "model", "is what is read"),
        (place / "p.png", "is not a folder"),
    ):
        with pytest.raises(UserError, match=said):
            saccade.calibrate(str(place / "model"), str(place / "photos"), "dynamicvit(0.7)", 1.0, cache=cache)


# Files


def foreign_npz(path: Path) -> None:
    np.savez(path, embedding=np.zeros(2), names=np.zeros(2), labels=np.zeros(2))


def foreign_safetensors(path: Path) -> None:
    save_file({"embedding": np.zeros(2, np.float32)}, path)  # without names


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("e.npz", foreign_npz),
        ("e.npz", lambda path: path.write_bytes(b"text")),
        ("e.safetensors", foreign_safetensors),
        ("e.safetensors", lambda path: path.write_bytes(b"\x08" + bytes(7) + b"{}      ")),
        ("e.safetensors", lambda path: save_file({"head.weight": np.zeros(2, np.float32)}, path, {"names": "[]"})),
    ],
)
def test_embeddings_replace_no_file_of_others(name: str, write, tmp_path: Path) -> None:
    write(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UserError, match="was not written by saccade"):
        EmbeddingFile(str(tmp_path / name))
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("kind", [".npz", ".safetensors"])
def test_embeddings_replace_their_own(kind: str, place: Path, tmp_path: Path) -> None:
    for photos in ("p.png", "photos"):
        file = EmbeddingFile(str(tmp_path / f"e{kind}"))
        for found in saccade.predict(str(place / "model"), str(place / photos)):
            file.add(found)
        file.close()
    assert len(file.names) == 21 and file.path.endswith(kind)
    EmbeddingFile(file.path)  # it may be written again


@pytest.mark.parametrize(
    ("name", "data"), [("predictions.csv", b"image,mine\n"), ("tokens/a.png", encode(picture(20, 20)))]
)
def test_predictions_replace_no_file_of_others(name: str, data: bytes, tmp_path: Path) -> None:
    write_folder(tmp_path, {name: data, "report.html": b'<meta name="generator" content="saccade">'})
    with pytest.raises(UserError, match="was not written by saccade"):
        PredictionFolder(str(tmp_path), 5)
    assert (tmp_path / name).read_bytes() == data
