"""The command as people type it, in a folder with a model and photos, bad ones too."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

import saccade
from data_helpers import bare_png, encode, picture, write_folder
from saccade.cli import main
from small_runs import files, tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A saved model, images, a photo, and what is wrong in all ways."""
    root = tmp_path_factory.mktemp("place")
    saccade.save(tiny(), root / "model")
    write_folder(root / "photos", files())
    write_folder(root / "two", files("ab"))
    write_folder(root / "one", files("a"))
    write_folder(root / "few", files(each=3))
    (root / "empty").mkdir()
    photo = encode(picture(90, 70))
    weights = saccade.create_model("vit_tiny_patch16_224").vit.state_dict()
    named = {
        "photo.png": photo,
        "text.png": b"no image",
        "cut.png": photo[: len(photo) // 2],
        "bomb.png": bare_png(10_000, 10_000, zlib.compress(b"")),
        "huge.png": bare_png(60_000, 60_000, zlib.compress(b"")),
        "narrow.png": encode(picture(20_000, 1)),
        "weights.pth": b"\x80\x02.",
    }
    write_folder(root, named)
    norm = weights.pop("norm.weight")
    save_file({**weights, "surplus": norm}, root / "keys.safetensors")
    save_file({**weights, "norm.weight": norm * float("nan")}, root / "nan.safetensors")
    return root


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(place, capsys, monkeypatch) -> Run:
    """Run the command where the images are: exit code, standard output, standard error."""
    monkeypatch.chdir(place)

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([*map(str, arguments)])
        return end.value.code or 0, *capsys.readouterr()

    return command
