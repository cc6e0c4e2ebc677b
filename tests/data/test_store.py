"""What lies below a path: regular files only, walked and read within bounds, in folders and in zips."""

from __future__ import annotations

import io
import os
import pickle
import socket
import stat
import threading
import zipfile
from pathlib import Path

import pytest

from data_helpers import encode, picture, write_folder, write_zip
from saccade.data import ImageError, ImageSet, decode, open_images
from saccade.data.store import Folder, TooLong, read_regular
from saccade.errors import UserError
from saccade.tasks.detection.detection_data import read_coco
from saccade.tasks.image_text.image_text_data import open_pairs
from saccade.tasks.segmentation.segmentation_data import open_pixels

PNG = encode(picture())


def reason(images: ImageSet, name: str) -> str:
    with pytest.raises(ImageError) as error:
        images.read(images.names.index(name))
    assert "\n" not in str(error.value)
    return error.value.reason


# Files that are none


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_folder(tmp_path, {"a/1.png": PNG}))
    os.mkfifo("a/2.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("a/3.png")
        Path("a/4.png").symlink_to("/dev/zero")
        Path("a/5.png").symlink_to("5.png")
        Path("a/6.png").symlink_to("2.png")
        Path("a/7.png").mkdir()
        images = open_images(tmp_path)
        assert images.names == [f"a/{i}.png" for i in range(1, 7)], "an empty folder is no image"
        assert images.fingerprint() == images.fingerprint()
        said = {name: reason(images, name) for name in images.names[1:]}
    assert [said[f"a/{i}.png"] for i in (2, 3, 4, 6)] == [
        f"cannot be read ({what}, not a file)" for what in ("a pipe", "a socket", "a device", "a pipe")
    ]
    assert "symbolic links" in said["a/5.png"]
    with pytest.raises(ImageError, match="a pipe, not a file"):
        decode(tmp_path / "a/2.png", "x")


@pytest.mark.parametrize("name", ["set.zip", "photo.png", "set"])
def test_a_pipe_is_no_image_set(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    for opening in (open_images, open_pairs, lambda path: open_pixels(path, None, "ab")):
        with pytest.raises(UserError, match="neither"):
            opening(tmp_path / name)


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl", "coco.json"])
def test_a_pipe_is_no_table(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"a pipe, not a file"):
        (read_coco if name == "coco.json" else open_pairs)(tmp_path / name)


def test_no_more_is_read_than_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "1.png"
    file.write_bytes(bytes(100))
    assert read_regular(file, 100) == bytes(100)
    with pytest.raises(TooLong) as error:
        read_regular(file, 99)
    assert error.value.size == 100
    assert read_regular(Path("/proc/self/status"), 2**20).startswith(b"Name:"), "a file that says it is empty"
    with pytest.raises(TooLong):
        read_regular(Path("/proc/self/status"), 10)


def test_a_file_that_grows_is_read_up_to_the_limit(tmp_path: Path) -> None:
    file, done = tmp_path / "1.png", threading.Event()
    file.write_bytes(bytes(1000))

    def grow() -> None:
        with file.open("ab") as stream:
            while not done.is_set():
                stream.write(bytes(10_000))
                stream.flush()

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        for _ in range(50):
            try:
                assert len(read_regular(file, 50_000)) <= 50_000
            except TooLong:
                break
    finally:
        done.set()
        writer.join()


# Links


def test_links_to_where_they_lie_are_walked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, {"a/1.png": PNG, "b/2.png": PNG})
    for i in range(150):
        (tmp_path / f"l{i}").symlink_to(".")
        (tmp_path / "a" / f"l{i}").symlink_to("..")
    looked: list[str] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (looked.append(os.fspath(path)), scan(path))[1])
    assert open_images(tmp_path).names == ["a/1.png", "b/2.png"]
    assert 3 <= len(looked) < 20, "three folders, looked into a few times at most; not once for each link"
    (tmp_path / "c").symlink_to("b")
    assert open_images(tmp_path).classes == ["a", "b", "c"], "an honest link is followed"


def test_many_links_to_one_folder_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/1.png": PNG, "x/y/2.png": PNG})
    for i in range(20):
        (tmp_path / "a" / f"l{i}").symlink_to("../x")
        (tmp_path / "x" / f"l{i}").symlink_to("y")
    with pytest.raises(UserError, match="over 8 links lead to"):
        open_images(tmp_path)


def test_entries_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saccade.data.store.MAX_ENTRIES", 10)
    files = {f"{i}.png": PNG for i in range(11)}
    for path in (write_folder(tmp_path / "s", files), write_zip(tmp_path / "s.zip", files)):
        with pytest.raises(UserError, match="over 10 files"):
            open_images(path)


def test_a_folder_travels_to_another_process(tmp_path: Path) -> None:
    folder = pickle.loads(pickle.dumps(Folder(write_folder(tmp_path, {"1.png": PNG}))))
    assert folder.read("1.png", 10**6) == PNG


# Zips


def odd_zip(path: Path, *entries: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a/1.png", "../b/1.png"], "leads out of it"),
        (["/a/1.png"], "leads out of it"),
        (["a\\1.png", "b\\2.png"], "backslashes"),
    ],
)
def test_names_that_no_folder_has_are_refused(tmp_path: Path, names: list[str], said: str) -> None:
    path = odd_zip(tmp_path / "s.zip", *((name, PNG) for name in names))
    with pytest.raises(UserError, match=said) as error:
        open_images(path)
    assert "s.zip" in str(error.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds 'a/1.png' more than once"):
        open_images(odd_zip(tmp_path / "s.zip", ("a/1.png", PNG), ("a/1.png", encode(picture(seed=2)))))


def test_a_link_in_a_zip_is_named(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("a/2.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    images = open_images(odd_zip(tmp_path / "s.zip", ("a/1.png", PNG), (link, b"/etc/passwd")))
    assert reason(images, "a/2.png") == "cannot be read (a link in a zip: pack what it points to)"
    assert images.read(0).size == (40, 30)


def test_an_encrypted_file_is_named(tmp_path: Path) -> None:
    data = bytearray(odd_zip(tmp_path / "s.zip", ("a/1.png", PNG)).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    (tmp_path / "s.zip").write_bytes(data)
    assert "encrypted" in reason(open_images(tmp_path / "s.zip"), "a/1.png")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCADE_MAX_PIXELS", "10000")
    path = odd_zip(tmp_path / "s.zip", ("a/1.png", PNG + bytes(2_000_000)))
    assert path.stat().st_size < 10_000
    assert "limit 80,000" in reason(open_images(path), "a/1.png")
    # One that announces fewer bytes than it holds.
    data, size = path.read_bytes(), (len(PNG) + 2_000_000).to_bytes(4, "little")
    assert data.count(size) == 2
    path.write_bytes(data.replace(size, (1000).to_bytes(4, "little")))
    assert "cannot be read" in reason(open_images(path), "a/1.png")


def test_damaged_zips_are_one_line(tmp_path: Path) -> None:
    whole = write_zip(tmp_path / "s.zip", {f"a/{i}.png": PNG for i in range(3)}).read_bytes()
    directory = whole.index(b"PK\x01\x02")
    for at in range(directory, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        (tmp_path / "d.zip").write_bytes(damaged)
        try:
            images = open_images(tmp_path / "d.zip")
            images.fingerprint()
            for i in range(len(images)):
                images.read(i)
        except UserError as error:  # an ImageError is one
            assert "\n" not in str(error)


def test_a_zip_of_an_empty_folder_has_no_images(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.mkdir("a.png")
    (tmp_path / "s.zip").write_bytes(stream.getvalue())
    with pytest.raises(UserError, match="no images"):
        open_images(tmp_path / "s.zip")
