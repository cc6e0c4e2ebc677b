"""The command around its verbs: version, help and its examples, completion, pipes, mistyped verbs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

import saccade
from saccade.cli import main, spread_values
from saccade.cli.application import app
from saccade.cli.common import complete_setting
from saccade.core.registry import registry
from saccade.training.config import shipped


def outside(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "saccade", *arguments], text=True, stderr=subprocess.PIPE, **options)


@pytest.fixture(scope="module")
def verbs() -> dict[str, click.Command]:
    with pytest.raises(SystemExit):
        main(["--version"])  # adds all verbs
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert not end.value.code and capsys.readouterr().out.startswith(f"saccade {saccade.__version__}, torch ")


def test_every_verb_has_an_example_that_parses(verbs):
    for name, verb in verbs.items():
        examples = re.findall(r"Example: saccade (.+?)(?:\n\n|$)", verb.help or "", re.DOTALL)
        if name == "demo":
            continue  # takes nothing
        assert examples, f"saccade {name} --help shows no example"
        for example in examples:
            words = shlex.split(" ".join(example.split()))
            assert words[0] == name
            verb.make_context(name, spread_values(words)[1:])  # raises for what it does not know


def test_help_of_every_verb_fits_eighty_columns(verbs, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for name in verbs:
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        text = capsys.readouterr().out
        assert not end.value.code and all(len(line) <= 80 for line in text.splitlines())
        if name not in ("list",):
            assert "Machine and output" in text


def test_training_names_every_config_that_is_shipped(verbs):
    said = re.split(r"[^a-z_]+", (verbs["train"].help or "").partition("Example")[0])
    assert sorted(shipped()) == sorted({*said} & {*shipped()})


@pytest.mark.parametrize(
    "given, verb", [(["train"], "train"), (["eval", "m"], "eval"), (["eval", "m", "d", "--x"], "eval")]
)
def test_misuse_leads_to_the_help_of_the_verb(given, verb, capsys):
    with pytest.raises(SystemExit) as end:
        main(given)
    assert end.value.code == 2 and capsys.readouterr().err.rstrip().endswith(f"(see saccade {verb} --help)")


def test_a_mistyped_verb_names_the_right_one(capsys):
    with pytest.raises(SystemExit) as end:
        main(["evl"])
    assert end.value.code == 2 and "Did you mean 'eval'" in capsys.readouterr().err


def test_names_are_completed_without_loading_anything():
    assert complete_setting("") == sorted(registry())
    assert complete_setting("to") == [name for name in sorted(registry()) if name.startswith("to")]
    assert complete_setting("tome(r=8) | ev") == ["tome(r=8) | evit"]
    assert complete_setting("nothing") == []


def test_a_closed_pipe_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        found = outside("list", stdout=pipe)
    assert found.returncode == 1 and "Traceback" not in found.stderr and "Exception" not in found.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["list"], ["--version"]])
def test_a_full_disk_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        found = outside(*arguments, stdout=full)
    assert (found.returncode, len(found.stderr.splitlines())) == (2, 1)


def test_a_terminal_that_knows_ascii_alone_is_no_traceback():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    found = outside("list", stdout=subprocess.PIPE, env=environment)
    assert found.returncode == 0 and found.stdout.isascii() and "tome" in found.stdout
