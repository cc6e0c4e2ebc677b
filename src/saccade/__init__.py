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

from saccade.renamed.finder import install

__version__ = "0.1.0"

_HOME = {
    "AdaptiveViT": "model",
    "Output": "core.output",
    "create_model": "checkpoint",
    "load": "checkpoint",
    "save": "backbones.saving",
    "flexify": "conversion.flexify",
    "convert": "conversion.flexify",
    "export": "evaluation.export",
    "fit_stem": "conversion.stem_fit",
    "from_transformers": "conversion.transformers",
    "patch_transformers": "conversion.transformers",
    "unpatch_transformers": "conversion.transformers",
    "Setting": "setting",
    "Tokens": "core.tokens",
    "Reduction": "core.reduction",
    "SoftReduction": "core.reduction",
    "reduce": "core.reduction",
    "Gates": "core.gates",
    "Plan": "core.plan",
    "Reducer": "core.plan",
    "Gater": "core.plan",
    "Method": "core.plan",
    "Tokenizer": "core.plan",
    "Head": "core.head",
    "EmbeddingHead": "tasks.embedding.embedding_head",
    "register": "core.registry",
    "load_plugin": "core.plugins",
    "register_scorer": "tokenizers.scorers",
    "save_mosaic": "tokenizers.mosaic.mosaic_files",
    "load_mosaic": "tokenizers.mosaic.mosaic_files",
    "list": "terminal.listing:list_methods",  # the verbs of the command, by the same names
    "eval": "tasks.evaluate:evaluate",
    "bench": "evaluation.speed",
    "autotune": "evaluation.stopwatch",
    "doctor": "evaluation.doctor",
    "calibrate": "evaluation.calibrate",
    "tune": "evaluation.report",
    "analyze": "analysis",
    "train": "training.train",
    "segment": "tasks.segmentation.mean_iou:evaluate_segmentation",
    "detect": "tasks.detection.average_precision:evaluate_detection",
    "zeroshot": "tasks.image_text.zero_shot:evaluate_words",
    "view": "reports",
    "relevance_map": "analysis.relevance_map",
    "predict": "prediction.predictor",
    "Predictor": "prediction.predictor",
    "Prediction": "prediction.predictions",
    "Trace": "core.record",
    "Execution": "execution.policy",
    "UserError": "errors",
}

# Not the names of builtins: "from saccade import *" must leave `list` and `eval` what they are.
__all__ = [*(name for name in _HOME if name not in vars(builtins)), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'saccade' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(import_module(f"saccade.{module}"), attribute or name)


install()
