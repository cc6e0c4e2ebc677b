"""ATen operators that torch.onnx has no translation for, in ONNX's own operators.

ONNX's TopK is stable by its definition: of equal values the one with the lower index comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def translations() -> dict[Callable, Callable]:
    """For ``torch.onnx.export(custom_translation_table=…)``; needs onnxscript."""
    from onnxscript import opset18 as op

    def sort_stable(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        """Values and indices."""
        length = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        return op.TopK(x, length, axis=dim, largest=int(descending), sorted=1)

    def argsort_stable(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        """Indices."""
        return sort_stable(x, dim=dim, descending=descending)[1]

    aten = torch.ops.aten
    return {
        aten.sort.stable: sort_stable,
        aten.argsort.stable: argsort_stable,
    }
