"""OpenVINO on the processor: ``model.xml`` and ``model.bin``, made from the ONNX form."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.runners.engine import Session
from saccade.runners.engines import onnx as onnx_engine
from saccade.runners.exported import EMBEDDING, IMAGES, LOGITS, OWNER, TOKENS, Exported
from saccade.runners.predict_script import HINTS

FILES = ("model.xml", "model.bin")
PACKAGES = ("openvino", "onnx", "onnxscript")
EXTRA = "openvino"
KNOWN = {LOGITS, EMBEDDING, OWNER, TOKENS}
NAMES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}


def dtypes() -> tuple[str, ...]:
    """fp32, int8 weights where NNCF is installed, and bf16 and fp16 where the processor has instructions for it."""
    import importlib.util

    import openvino

    can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    half = [name for name, hint in (("bf16", "BF16"), ("fp16", "FP16")) if hint in can]
    return "fp32", *half, *(["int8"] if importlib.util.find_spec("nncf") else [])


def write(exported: Exported, folder: Path, dtype: str) -> None:
    """Write ``model.xml`` and ``model.bin``. Raises UserError for an operator without translation."""
    import openvino

    model = openvino.Core().read_model(onnx_engine.convert(exported).SerializeToString())
    for operator in model.get_ops():
        if operator.get_type_name() == "TopK":
            operator.set_attribute("sort", "value")  # not "none", of which nothing can be stable
            operator.set_attribute("stable", True)  # as ONNX defines it; OpenVINO's reader leaves it out
    if dtype == "int8":
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(model, folder / FILES[0], compress_to_fp16=False)


def open(folder: Path, dtype: str, threads: int) -> Session:
    """The files in OpenVINO's processor plugin; each thread that calls has a request of its own."""
    import openvino

    config = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": HINTS[dtype],
    }
    compiled = openvino.Core().compile_model(str(folder / FILES[0]), "CPU", config)
    names = tuple(min(output.get_names() & KNOWN, default=output.get_any_name()) for output in compiled.outputs)
    local = threading.local()

    def run(images: Tensor) -> tuple[Tensor, ...]:
        request: Any = getattr(local, "request", None)
        if request is None:
            request = local.request = compiled.create_infer_request()
        found = request.infer({IMAGES: images.detach().cpu().contiguous().numpy()}, share_inputs=True)
        return tuple(torch.from_numpy(found[i].copy()) for i in range(len(names)))

    precision = NAMES.get(compiled.get_property("INFERENCE_PRECISION_HINT").to_string(), "fp32")
    return Session(run, names, "openvino", dtype, precision, "cpu", threads)
