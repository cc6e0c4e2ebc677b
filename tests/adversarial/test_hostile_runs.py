"""Training configs, ``key=value`` changes, and the files of a run that are read back: refused, or as they were."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saccade
from attack import VALUES, attempt, damaged, outcomes, refusals, twisted
from data_helpers import encode, picture, write_folder
from saccade.errors import UserError
from saccade.storage.signs import is_ours
from saccade.training.checkpoints import read_state
from saccade.training.config import Config, read_config, shipped
from saccade.training.logging import read_table
from saccade.training.train import train

MODEL = {"embed_dim": 16, "depth": 1, "num_heads": 1, "img_size": 16, "patch_size": 8}
SECTIONS = {
    "model": {"args": MODEL},
    "data": {"workers": 0, "holdout": 0.3, "check_limit": 8},
    "optim": {"warmup": 0.0, "ema": 0.9},
    "run": {"steps": 2, "batch": 4, "save_every": 1, "log_every": 1, "check_every": 0.5, "threads": 1, "device": "cpu"},
}


def same(found: Config | UserError) -> bool:
    """Whether a config that is accepted survives being written and read."""
    refused = isinstance(found, UserError)
    return refused or Config.model_validate(json.loads(json.dumps(found.model_dump(mode="json")))) == found


@pytest.mark.parametrize("count", [600, pytest.param(None, marks=pytest.mark.slow)])
def test_every_key_changed(count):
    whole = Config().model_dump(mode="json")
    found = outcomes(twisted(whole, 0, count), lambda value: attempt(lambda: read_config(value)))
    assert 0 < refusals(found) < len(found)
    assert all(map(same, found))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["optim.betas", "optim.lr", "run.epochs", "augment.scale", "distill.temperature"])
def test_a_number_that_is_none_is_refused(name, value):
    """Alone or in a pair, in every section."""
    section, key = name.split(".")
    given = Config().model_dump()[section][key]
    bad = [given[0], value] if isinstance(given, (list, tuple)) else value
    with pytest.raises(UserError, match=key):
        read_config({section: {key: bad}})


@pytest.mark.parametrize("count", [40, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", shipped())
def test_bytes_of_files(tmp_path, name, count):
    good, file = shipped()[name].encode(), tmp_path / "run.toml"

    def read(data: bytes) -> Config | UserError:
        file.write_bytes(data)
        return attempt(lambda: read_config(str(file)))

    found = outcomes(damaged(good, 0, count, header=len(good)), read)
    assert refusals(found) > 0
    assert all(map(same, found))


KEYS = sorted(f"{s}.{k}" for s, v in Config().model_dump().items() if isinstance(v, dict) for k in v)
CHANGES = st.one_of(
    st.tuples(st.sampled_from(KEYS), st.sampled_from([repr(v)[:2000] for v in VALUES])).map("=".join),
    st.tuples(st.sampled_from([*KEYS, "", ".", "optim", "a.b.c.d", "optim.lr.x", "__class__", "optim..lr"]),
              st.text(max_size=30)).map("=".join),
    st.text(max_size=40),
    st.sampled_from(["optim.lr=1e-3\noptim.lr=2", "run.steps=[" * 200, "model.args={}}", "data.path=''''''", "=="]),
)  # fmt: skip


@settings(max_examples=150)
@given(st.lists(CHANGES, max_size=3))
def test_changes(changes):
    assert same(attempt(lambda: read_config("finetune", changes)))


# What a run leaves and reads again


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """A finished run, its config, and the weights that it gave."""
    root = tmp_path_factory.mktemp("run")
    write_folder(root / "images", {f"{c}/{i}.png": encode(picture(20, 20, seed=i)) for c in "ab" for i in range(12)})
    config = {**SECTIONS, "data": {**SECTIONS["data"], "path": str(root / "images")}}
    found = train(config, out=root / "out")
    return root / "out", config, found.model.state_dict()


def resumed(folder: Path, config: dict[str, Any], expected: dict[str, torch.Tensor]) -> bool:
    """Whether resuming a run is refused, or gives what it gave: at its end there is nothing left to train."""
    found = attempt(lambda: train(config, out=folder, resume=True))
    if isinstance(found, UserError):
        return True
    saccade.load(folder / "model")
    whole = (folder / "report.html").read_text().rstrip().endswith("</html>")
    return whole and all(torch.equal(v, expected[k]) for k, v in found.model.state_dict().items())


def files_read_back(folder: Path) -> list[str]:
    found = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    return sorted(n for n in found if not n.startswith("model/") and not n.endswith("report.html"))


@pytest.mark.parametrize("each", [1, pytest.param(60, marks=pytest.mark.slow)])
def test_damaged_files_of_a_run(run, tmp_path, each):
    out, config, expected = run
    names = files_read_back(out)
    assert {Path(n).suffix for n in names} >= {".csv", ".json", ".safetensors"}
    for name in names:
        for case, data in damaged((out / name).read_bytes(), 0, each):
            copy = Path(shutil.copytree(out, tmp_path / "copy"))
            (copy / name).write_bytes(data)
            assert outcomes([(f"{name} {case}", copy)], lambda copy: resumed(copy, config, expected)) == [True], case
            shutil.rmtree(copy)


@pytest.mark.parametrize("count", [8, pytest.param(500, marks=pytest.mark.slow)])
def test_facts_of_a_checkpoint_changed(run, tmp_path, count):
    """JSON that is whole and wrong."""
    out, config, expected = run
    facts = max(out.glob("checkpoints/last-*/state.json"))
    told = {k: v for k, v in json.loads(facts.read_text()).items() if k != "config"}

    def with_facts(value: dict[str, Any]) -> bool:
        copy = Path(shutil.copytree(out, tmp_path / "copy"))
        (copy / facts.relative_to(out)).write_bytes(
            json.dumps({**json.loads(facts.read_text()), **value}).encode("utf-8", "surrogatepass")
        )
        found = resumed(copy, config, expected)
        shutil.rmtree(copy)
        return found

    found = outcomes(twisted(told, 0, count), with_facts)
    assert found and all(found)


TABLES = {
    "nothing": "",
    "no header": "1,2,3\n",
    "other columns": "a,b\n1,2\n",
    "NaN steps": "step,loss\nnan,1\ninf,2\n-1,3\n1e400,4\n",
    "text for numbers": "step,epoch,lr,loss,wait,images_per_s,gmacs,images\n1,x,y,z,a,b,c,d\n",
    "short and long rows": "step,loss\n1\n2,3,4,5\n",
    "zero bytes": "step,loss\n\0\0\0\n",
    "one field of 1 MB": "step,loss\n1," + "9" * 2**20 + "\n",
    "not UTF-8": "step,loss\n1,\udcff\n",
}


@pytest.mark.parametrize("what", TABLES)
@pytest.mark.parametrize("name", ["metrics.csv", "checks.csv"])
def test_tables_of_a_run(run, tmp_path, name, what):
    out, config, expected = run
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    (copy / name).write_bytes(TABLES[what].encode("utf-8", "surrogateescape"))
    assert resumed(copy, config, expected)
    with open(copy / name, encoding="utf-8", errors="replace") as file:
        list(csv.reader(line.replace("\0", "") for line in file if len(line) < 10**5))


# What eval keeps


@pytest.mark.parametrize("count", [5, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_cache_of_eval(tmp_path, count):
    """A damaged entry is measured again: the numbers are those of a call without a cache."""
    files = {f"{c}/{i}.png": encode(picture(20, 20, seed=i + 50 * (c == "b"))) for c in "ab" for i in range(6)}
    images = write_folder(tmp_path / "images", files)
    torch.manual_seed(0)
    model = saccade.create_model("vit_tiny_patch16_224", **MODEL, num_classes=2)
    out = tmp_path / "out"

    def rows() -> Any:
        return saccade.eval(model, images, ["tome(r=1)", "evit(0.5, at=(0,))"], out=out).rows

    expected = rows()
    names = files_read_back(out)
    assert any(n.startswith("cache/") for n in names)
    for name in (n for n in names if n.startswith("cache/")):
        good = (out / name).read_bytes()
        for case, data in damaged(good, 0, count, header=len(good)):
            (out / name).write_bytes(data)
            found = attempt(rows)
            assert not isinstance(found, UserError), f"{name} {case}: {found}"
            assert found == expected, f"{name} {case}"


# Names


def test_a_class_folder_that_is_not_text_is_refused_before_training(tmp_path):
    """It would be trained, and then the model could not be saved."""
    odd = os.fsdecode(b"caf\xe9")
    write_folder(tmp_path / "images", {f"{c}/{i}.png": encode(picture(20, 20)) for c in ("tea", odd) for i in range(4)})
    config = {**SECTIONS, "data": {**SECTIONS["data"], "path": str(tmp_path / "images"), "holdout": 0}}
    with pytest.raises(UserError, match="not UTF-8"):
        train(config, out=tmp_path / "out")
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_an_answer_of_a_broken_model_is_no_label(tmp_path):
    write_folder(tmp_path, {"a.png": encode(picture(20, 20))})
    model = saccade.create_model("vit_tiny_patch16_224", **MODEL, num_classes=2)
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            model.vit.head.bias[1] = value
        (found,) = saccade.predict(model, tmp_path / "a.png")
        assert "NaN" in found.error and not found.labels


@pytest.mark.parametrize("name", ["metrics.csv", "state.json", "frontier.json"])
def test_files_of_a_run_without_an_end(tmp_path, name):
    """Holes of 64 GiB cost no memory and no time: refused, or not taken for ours."""
    file = tmp_path / "last-00000001" / name
    file.parent.mkdir()
    with open(file, "wb") as hole:
        hole.truncate(64 << 30)
    if name == "metrics.csv":
        with pytest.raises(UserError, match="is over 256 MiB"):
            read_table(file)
    elif name == "state.json":
        with pytest.raises(UserError, match="is over 64 MiB"):
            read_state(file.parent)
    else:
        assert not is_ours(file, ("rows",))
