"""Who owns a run's folder starts without what killed runs left unfinished in it."""

from __future__ import annotations

import pytest

from saccade.storage.files import part_beside
from saccade.storage.run_folder import taking


@pytest.mark.parametrize("place", [".", "model", "checkpoints", "cache", "cache/1a2b", "checkpoints/last-00000010"])
def test_what_is_unfinished_goes_and_all_else_stays(tmp_path, place):
    folder = tmp_path / "out" / place
    folder.mkdir(parents=True)
    left, kept = part_beside(folder / "rows.safetensors"), folder / "rows.bin"
    for file in (left, kept):
        file.write_bytes(b"x")
    with taking(tmp_path / "out", {}):
        assert not left.exists() and kept.exists()
