"""What every test of the project shares: one thread, quiet and repeatable property tests, the data folder."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("SACCADE_SKIP", "always")  # counts that do not depend on a measurement; its own tests unset it
os.environ.setdefault("SACCADE_ATTENTION", "fused")  # nor on which kernel a stopwatch found faster in half precision
os.environ.setdefault("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))  # fonts are looked for once
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="saccade-tests-")  # what was measured here stays out of tests
os.environ.pop("COLUMNS", None)  # of the terminal that the tests run in; tests of tables give their own
torch.set_num_threads(1)  # small models: a second thread only waits

settings.register_profile(
    "saccade", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("saccade")


def pytest_collection_finish() -> None:
    """Modules and thousands of tests stay to the end: no collection of garbage need walk through them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real weights and images: ``$SACCADE_DATA``, or ``shared/data`` beside the repository; skips without them."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SACCADE_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no data folder {folder} (set SACCADE_DATA)")
    return folder
