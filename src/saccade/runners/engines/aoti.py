"""AOTInductor: the program compiled to machine code for this processor, one ``.pt2`` package."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from saccade.errors import UserError
from saccade.runners.engine import Session
from saccade.runners.exported import Exported, quiet

FILES = ("model.pt2",)
PACKAGES: tuple[str, ...] = ()
EXTRA = ""
NAMES, INPUT = "outputs", "input"  # metadata


def dtypes() -> tuple[str, ...]:
    """Number types of PyTorch's own kernels."""
    return "fp32", "bf16"


def parts(batch: int, threads: int) -> int:
    """One: all threads work on the whole batch."""
    return 1


def write(exported: Exported, folder: Path, dtype: str) -> None:
    """Write ``model.pt2``. Raises UserError where there is no C++ compiler, or what it is given does not compile."""
    import torch._inductor as inductor

    told = {NAMES: " ".join(exported.outputs), INPUT: str(exported.example.dtype)}
    try:
        with quiet(), torch.no_grad():
            inductor.aoti_compile_and_package(
                exported.program,
                package_path=str(folder / FILES[0]),
                inductor_configs={"aot_inductor.metadata": told},
            )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"AOTInductor does not compile it here ({type(error).__name__}: {reason})") from error


def open(folder: Path, dtype: str, threads: int) -> Session:
    """The package, loaded: it is machine code, so open none that you would not run."""
    import torch._inductor as inductor

    package = inductor.aoti_load_package(str(folder / FILES[0]))
    told = package.get_metadata()
    names, dtype_in = tuple(told.get(NAMES, "logits").split()), told.get(INPUT)

    def run(images: Tensor) -> tuple[Tensor, ...]:
        if str(images.dtype) != (dtype_in or str(images.dtype)):  # the package would read its bytes for others
            raise UserError(f"images of {images.dtype}: this program takes {dtype_in}")
        with torch.inference_mode():
            return tuple(package(images.contiguous()))

    return Session(run, names, "aoti", dtype, dtype, "cpu", torch.get_num_threads())
