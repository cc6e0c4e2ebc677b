"""ONNX Runtime: one ``.onnx`` file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade.errors import UserError
from saccade.runners.engine import Session
from saccade.runners.exported import IMAGES, Exported, quiet, reason, silent
from saccade.runners.lowering import lower

if TYPE_CHECKING:
    import onnx

FILES = ("model.onnx",)
PACKAGES = ("onnxruntime", "onnx", "onnxscript")
EXTRA = "onnx"
OPSET = 18
SPINNING = "session.intra_op.allow_spinning"
APART = "output "  # before the names of outputs, until no value inside is called alike
LACKING = (torch.ops.aten.searchsorted.Tensor,)


def dtypes() -> tuple[str, ...]:
    """ONNX Runtime's processor kernels have no bf16 matrix product; int8: weights, by dynamic quantisation."""
    return "fp32", "int8"


def parts(batch: int, threads: int) -> int:
    """One: all threads work on the whole batch."""
    return 1


def write(exported: Exported, folder: Path, dtype: str) -> None:
    """Write ``model.onnx``. Raises UserError for an operator without translation."""
    import onnx

    model = convert(exported)
    file = folder / FILES[0]
    if dtype == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        whole = folder / "whole.onnx"
        onnx.save_model(model, whole)
        with silent():
            quantize_dynamic(whole, file, weight_type=QuantType.QInt8)
        whole.unlink()
    else:
        onnx.save_model(model, file)


def convert(exported: Exported) -> onnx.ModelProto:
    """The program in ONNX's operators of opset 18, none of its own; its input is ``images``.

    Raises UserError for an operator without translation.
    """
    from saccade.runners.engines.onnx_operators import translations

    lower(exported.program, LACKING)
    try:
        # Fused attention on a processor has other strides than its decomposition, which what reads it is traced with.
        with quiet(), silent(), sdpa_kernel(SDPBackend.MATH):
            made = torch.onnx.export(
                exported.program,
                (exported.example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[IMAGES],
                output_names=[APART + name for name in exported.outputs],
                custom_translation_table=translations(),
                verbose=False,
            )
    except Exception as error:
        raise UserError(f"ONNX has no form for this program ({reason(error)})") from error
    assert made is not None
    return _named(made.model_proto, exported.outputs)


def _named(model: onnx.ModelProto, outputs: Sequence[str]) -> onnx.ModelProto:
    """The model with its outputs' own names; what is called so inside, after an operator, gets another."""
    names = {name: f"{name}_inside" for name in outputs} | {APART + name: name for name in outputs}
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]
    for value in (*model.graph.output, *model.graph.value_info, *model.graph.initializer):
        value.name = names.get(value.name, value.name)
    return model


def open(folder: Path, dtype: str, threads: int) -> Session:
    """The file in ONNX Runtime, on the processor.

    Its threads sleep between calls. They would wait for the next one at full load, on the cores that another setting of
    the model, PyTorch or a server needs meanwhile: two sessions in turn then take 2 to 3 times as long at batch 1.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry(SPINNING, "0")
    session = onnxruntime.InferenceSession(str(folder / FILES[0]), options, providers=["CPUExecutionProvider"])
    names = tuple(output.name for output in session.get_outputs())

    def run(images: Tensor) -> tuple[Tensor, ...]:
        found = session.run(None, {IMAGES: images.detach().cpu().numpy()})
        return tuple(torch.from_numpy(value) for value in found)

    return Session(run, names, "onnx", dtype, dtype, "cpu", threads)
