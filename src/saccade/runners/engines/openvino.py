"""OpenVINO on the processor: ``model.xml`` and ``model.bin``."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import threading
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade.errors import UserError
from saccade.runners.engine import Session
from saccade.runners.engines.openvino_operators import quicken
from saccade.runners.exported import EMBEDDING, IMAGES, LOGITS, OWNER, TOKENS, Exported, quiet, reason, silent
from saccade.runners.lowering import RULES, lower, numbers
from saccade.runners.predict_script import HINTS

if TYPE_CHECKING:
    import openvino

LARGEST = 2**31  # of whole numbers, whatever their type says
FILES = ("model.xml", "model.bin")
PACKAGES = ("openvino",)
EXTRA = "openvino"
KNOWN = {LOGITS, EMBEDDING, OWNER, TOKENS}
PARTS = ["saccade", "parts"]  # where a program's file says of how many parts its batch is
FIXED = 2  # sizes of batch that a program is compiled for, each with memory of its own, beside one for any size
NAMES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}


def library() -> Any:
    """OpenVINO, without the telemetry that its import starts: a thread, and a process that calls a server."""
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if it were not installed
    return importlib.import_module("openvino")


@cache
def core() -> Any:
    """OpenVINO's core, one for the life of the process.

    With the processor's plugin it gives the thread that loads it a stack for signals, and unmaps that stack where it is
    destroyed, in whatever thread that is: in another one than the first, the next signal, a Ctrl-C or the end of a
    child, would end the process.
    """
    return library().Core()


def dtypes() -> tuple[str, ...]:
    """fp32, int8 weights where NNCF is installed, and bf16 and fp16 where the processor has instructions for it."""
    can = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    half = [name for name, hint in (("bf16", "BF16"), ("fp16", "FP16")) if hint in can]
    return "fp32", *half, *(["int8"] if importlib.util.find_spec("nncf") else [])


def parts(batch: int, threads: int) -> int:
    """As many as threads, as far as that divides a batch: threads that share one operator wait for each other."""
    return math.gcd(batch, threads)


def write(exported: Exported, folder: Path, dtype: str) -> None:
    """Write ``model.xml`` and ``model.bin``. Raises UserError for an operator without translation."""
    openvino = library()
    if any(isinstance(value, int) and LARGEST < abs(value) < 2**63 - 1 for value in numbers(exported.program)):
        raise UserError("OpenVINO computes whole numbers in 32 bits, and this setting draws by larger ones: use onnx")
    quicken(exported.program)
    lower(exported.program, tuple(RULES))
    try:
        # One kind of attention for all that is traced in a process: torch remembers strides, from one to another.
        with quiet(), silent(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model = read(exported.program)
    except Exception as error:
        raise UserError(f"OpenVINO has no form for this program ({reason(error)})") from error
    model.reshape([size if isinstance(size, int) else -1 for size in exported.sizes()])  # the reader frees them all
    model.inputs[0].set_names({IMAGES})
    for output, name in zip(model.outputs, exported.outputs, strict=True):
        output.set_names({name})
    model.set_rt_info(str(exported.parts), PARTS)
    for operator in model.get_ordered_ops():
        as_asked(operator)
    if dtype == "int8":
        try:
            import nncf
        except ImportError as error:
            raise UserError(
                f"int8 needs NNCF, and {error.name or 'nncf'} is missing: pip install nncf tabulate"
            ) from None
        with silent():
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(model, folder / FILES[0], compress_to_fp16=False)


def as_asked(operator: Any) -> None:
    """What OpenVINO's reader made of an operator: its largest values by a stable sort, and places as they are.

    The reader leaves out that torch's sort was asked to be stable, and of places p of n, which may be negative in torch
    and are none here, it takes (p + n) % n.
    """
    if operator.get_type_name() == "TopK":
        how = operator.get_attributes()
        given = [operator.input_value(i) for i in range(2)]
        kinds = {name: how[name] for name in ("axis", "mode", "index_element_type")}
        new = importlib.import_module("openvino.opset11").topk(*given, sort="value", stable=True, **kinds)
        for old, found in zip(operator.outputs(), new.outputs(), strict=True):
            old.replace(found)
    elif operator.get_type_name() == "Mod":
        total = operator.input_value(0).get_node()
        if total.get_type_name() == "Add" and total.input_value(1) == operator.input_value(1):
            operator.output(0).replace(total.input_value(0))


def read(program: ExportedProgram) -> openvino.Model:
    """The program by OpenVINO's reader. ``openvino.convert_model`` would also tell its makers, through the network."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    readers = FrontEndManager()  # has to live while one of its readers does
    reader, decoder = readers.load_by_framework("pytorch"), TorchFXPythonDecoder.from_exported_program(program)
    return reader.convert(reader.load(decoder, True))


def open(folder: Path, dtype: str, threads: int) -> Session:
    """The files in OpenVINO's processor plugin; each thread that calls has requests of its own."""
    compiled = Compiled(core().read_model(str(folder / FILES[0])), HINTS[dtype], threads)
    first, local = compiled.of(1)[0], threading.local()
    names = tuple(min(output.get_names() & KNOWN, default=output.get_any_name()) for output in first.outputs)

    def run(images: Tensor) -> tuple[Tensor, ...]:
        program, count = compiled.of(len(images))
        if len(images) % count:
            raise UserError(f"{len(images)} images: this program takes a batch of {count} equal parts")
        requests = vars(local).setdefault("requests", {})
        asked = requests.get(id(program)) or [program.create_infer_request() for _ in range(count)]
        requests[id(program)] = asked
        given = images.detach().cpu().contiguous().numpy()
        size = len(given) // count
        for i, request in enumerate(asked):
            request.start_async({IMAGES: given[i * size : (i + 1) * size]}, share_inputs=True)
        for request in asked:
            request.wait()
        found = [[torch.from_numpy(request.get_output_tensor(i).data) for request in asked] for i in range(len(names))]
        return tuple(torch.cat(part) for part in found)  # a copy: the engine writes there again

    precision = NAMES.get(first.get_property("INFERENCE_PRECISION_HINT").to_string(), "fp32")
    return Session(run, names, "openvino", dtype, precision, "cpu", threads)


class Compiled:
    """A program compiled for the batches that come: one image and the first other size each by itself, then any size.

    Where a program is for any size, OpenVINO finds the shapes of all its operators anew in each run. At batch 1 of a
    small model that is a quarter of the time of a setting that merges, whose operators are many and small. Batches are
    run in ``parts``; a program that was exported for one size says of how many its batch is.
    """

    def __init__(self, program: openvino.Model, precision: str, threads: int) -> None:
        self._program, self._threads = program, threads
        self._config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
        batch, *image = program.input(0).partial_shape
        self._fixed = batch.get_length() if batch.is_static else None
        self._parts = int(program.get_rt_info(PARTS).astype(str)) if program.has_rt_info(PARTS) else 1
        self._sized = batch.is_dynamic and all(side.is_static for side in image)
        self._made: dict[tuple[int | None, int], openvino.CompiledModel] = {}
        self._lock = threading.Lock()

    def of(self, batch: int) -> tuple[openvino.CompiledModel, int]:
        """What runs batches of that size, and in how many parts; compiled by the first call, a second or more."""
        with self._lock:
            key = self._key(batch)
            if key not in self._made:
                self._made[key] = self._compile(*key)
            return self._made[key], key[1]

    def _key(self, batch: int) -> tuple[int | None, int]:
        """Images of one part, None for any number, and parts."""
        if self._fixed:
            return None, self._parts
        count = parts(batch, self._threads) if batch else 1
        sized = batch > 0 and self._sized and ((batch // count, count) in self._made or len(self._made) < FIXED)
        return (batch // count, count) if sized else (None, 1)

    def _compile(self, size: int | None, count: int) -> openvino.CompiledModel:
        program = self._program.clone()
        if size is not None:
            program.reshape([size, *(side.get_length() for side in list(program.input(0).partial_shape)[1:])])
        how = {"PERFORMANCE_HINT": "LATENCY"} if count == 1 else {"NUM_STREAMS": count}
        return core().compile_model(program, "CPU", {**self._config, **how})
