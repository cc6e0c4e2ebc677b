"""``Runner``: how a model is run, by which engine and in which number type: ``tune`` recommends it, folders say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from saccade.core.hooks import copied
from saccade.errors import UserError

if TYPE_CHECKING:
    from saccade.model import AdaptiveViT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTISED = "int8"  # weights, by an engine
EAGER, COMPILE, CUDAGRAPH = "eager", "compile", "cudagraph"
IN_TORCH = (EAGER, COMPILE, CUDAGRAPH)
ENGINES = (*IN_TORCH, "torch", "aoti", "onnx", "openvino")
ON_PROCESSOR = ("onnx", "openvino")  # as this library runs them
NOUNS = {
    COMPILE: "torch.compile",
    CUDAGRAPH: "CUDA graph",
    "torch": "torch.export",
    "aoti": "AOTInductor",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
}
ALIASES = {"compiled": COMPILE}


@dataclass(frozen=True)
class Runner:
    """A way to run a model.

    Raises UserError for an unknown number type or engine, or a batch that is no whole number of images.
    """

    dtype: str = "fp32"  #       of weights and activations; images and logits are fp32 whatever it is
    engine: str = EAGER  #       what computes: PyTorch, or what a program exported from it is run by
    batch: int | None = None  #  images at once that its speed was measured at; ``compile`` is made for just so many

    def __post_init__(self) -> None:
        known = (*DTYPES, *([QUANTISED] if self.exported else []))
        if self.engine not in ENGINES:
            raise UserError(f"engine {str(self.engine)[:40]!r} is not one of {', '.join(ENGINES)}")
        if self.dtype not in known:
            raise UserError(f"dtype {str(self.dtype)[:40]!r} is not one of {', '.join(known)}")
        if self.batch is not None and not (type(self.batch) is int and 1 <= self.batch <= 65536):
            raise UserError(f"batch={str(self.batch)[:40]} is not a whole number in [1, 65536]")

    @classmethod
    def of(cls, given: Runner | str | Mapping[str, Any]) -> Runner:
        """A runner as people and folders write it: ``"bf16"``, ``"bf16 compiled"``, ``"openvino"``, or its fields.

        Raises UserError.
        """
        if isinstance(given, Runner):
            return given
        if isinstance(given, str):
            words = [ALIASES.get(word, word) for word in given.split()]
            engines, dtypes = ([w for w in words if (w in ENGINES) == named] for named in (True, False))
            if len(dtypes) > 1 or len(engines) > 1:
                raise UserError(f"runner {given[:40]!r} is not like 'bf16', 'bf16 compiled', 'openvino' or 'eager'")
            if unknown := [w for w in dtypes if w not in (*DTYPES, QUANTISED)]:
                known = f"a number type ({', '.join(DTYPES)}, {QUANTISED}) nor an engine ({', '.join(ENGINES)})"
                raise UserError(f"runner {given[:40]!r}: {unknown[0][:40]!r} is neither {known}")
            return cls((dtypes or ["fp32"])[0], (engines or [EAGER])[0])
        if isinstance(given, Mapping) and given.keys() <= {"dtype", "engine", "compiled", "batch"}:
            fields = {**given, "engine": given.get("engine") or (COMPILE if compiled(given) else EAGER)}
            fields.pop("compiled", None)
            return cls(**fields)
        raise UserError(f"runner {str(given)[:60]} is not a text like 'bf16 compiled' or {{dtype, engine, batch}}")

    def __str__(self) -> str:
        word = {EAGER: "", COMPILE: " compiled"}
        return self.dtype + word.get(self.engine, f" {self.engine}")

    def to_dict(self) -> dict[str, Any]:
        """As a folder's config holds it; what PyTorch runs is written so that earlier versions read it too."""
        engine = {"compiled": self.compiled} if self.engine in (EAGER, COMPILE) else {"engine": self.engine}
        return {"dtype": self.dtype, **engine, "batch": self.batch}

    @property
    def compiled(self) -> bool:
        """By ``torch.compile``."""
        return self.engine == COMPILE

    @property
    def exported(self) -> bool:
        """By an engine that takes an exported program."""
        return self.engine not in IN_TORCH

    @property
    def engine_noun(self) -> str:
        """As people call it."""
        return NOUNS.get(self.engine, self.engine)

    @property
    def is_plain(self) -> bool:
        """fp32, operator by operator: the weights as they are."""
        return self == Runner(batch=self.batch)

    def described(self) -> str:
        """As a printed model says it."""
        size = f" in batches of {self.batch}" if self.batch else ""
        made = f", compiled{size} at the first call" if self.compiled else ""
        made = made if self.engine in (EAGER, COMPILE) else f" by {self.engine_noun}"
        return f"runs in {self.dtype}{made} (fp32 in and out; plain: model.deploy(None))"

    @property
    def weights_dtype(self) -> torch.dtype:
        """The number type of PyTorch's weights; some engines take fp32, and make of it what they compute in."""
        return torch.float32 if self.engine in ON_PROCESSOR else DTYPES[self.dtype]

    def model(self, model: AdaptiveViT) -> AdaptiveViT:
        """The model itself in this number type, run operator by operator (a copy, unless it is its own), on the
        processor where the engine runs there alone."""
        plain = model.deploy(None)
        weight = next(plain.parameters())
        device = torch.device("cpu") if self.engine in ON_PROCESSOR else weight.device
        if (weight.dtype, weight.device) == (self.weights_dtype, device):
            return plain
        return copied(plain).to(device, self.weights_dtype)


def compiled(fields: Mapping[str, Any]) -> bool:
    """Whether a folder's runner, as earlier versions wrote it, is compiled. Raises UserError."""
    said = fields.get("compiled", False)
    if type(said) is not bool:
        raise UserError(f"compiled={str(said)[:40]} is neither true nor false")
    return said


FP32 = Runner()
