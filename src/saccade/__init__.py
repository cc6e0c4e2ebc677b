"""Saccade: adaptive compute for Vision Transformers.

    model = saccade.create_model("deit_small_patch16_224", "tome(r=13)", pretrained=True)
    out = model(images)                # out.logits, out.tokens, out.trace
    fast = model.at("evit(0.7)")       # same parameters, other compute

Names load on first use, so that ``saccade --help`` does not wait for PyTorch.
"""

from __future__ import annotations

import builtins
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AdaptiveViT": "model",
    "Output": "model",
    "create_model": "checkpoint",
    "load": "checkpoint",
    "save": "checkpoint",
    "flexify": "flexible",
    "convert": "flexible",
    "fit_stem": "stem",
    "Setting": "setting",
    "Tokens": "tokens",
    "Reduction": "reduction",
    "SoftReduction": "reduction",
    "reduce": "reduction",
    "Gates": "gates",
    "Plan": "plan",
    "Reducer": "plan",
    "Gater": "plan",
    "Method": "plan",
    "Tokenizer": "plan",
    "register": "plan",
    "register_scorer": "tokenizers.scorers",
    "save_mosaic": "tokenizers.mosaic_files",
    "load_mosaic": "tokenizers.mosaic_files",
    "list": "listing:list_methods",  # the verbs of the command, by the same names
    "eval": "measure.sweep:evaluate",
    "bench": "measure.speed",
    "autotune": "stopwatch",
    "calibrate": "measure.calibrate",
    "tune": "measure.publish",
    "analyze": "analysis",
    "train": "training.train",
    "segment": "tasks.miou:evaluate_segmentation",
    "detect": "tasks.precision:evaluate_detection",
    "zeroshot": "tasks.zeroshot:evaluate_words",
    "view": "views",
    "predict": "predictor",
    "Predictor": "predictor",
    "Prediction": "prediction",
    "Trace": "trace",
    "Execution": "policy",
    "UserError": "errors",
}

# Not the names of builtins: "from saccade import *" must leave `list` and `eval` what they are.
__all__ = [*(name for name in _HOME if name not in vars(builtins)), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'saccade' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(import_module(f"saccade.{module}"), attribute or name)
