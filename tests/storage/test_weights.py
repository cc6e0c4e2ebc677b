"""Weights files that cannot be read are named in one line, whoever objects."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from saccade.errors import UserError
from saccade.storage import weights


@pytest.mark.parametrize("error", [RuntimeError("unable to open file <x>: No such file (2)"), OSError("gone")])
@pytest.mark.parametrize(("name", "read"), [("safe_open", weights.read_header), ("load_file", weights.read_weights)])
def test_a_file_that_goes_while_it_is_opened(tmp_path, monkeypatch, name, read, error):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")

    def fail(*_):
        raise error

    monkeypatch.setattr(weights, name, fail)
    with pytest.raises(UserError, match=r"a\.safetensors' is not a readable"):
        read(tmp_path / "a.safetensors")
