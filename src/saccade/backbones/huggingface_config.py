"""``config.json`` of Hugging Face's Vision Transformers: which kinds have a form in timm, and what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, FiniteFloat, ValidationError

from saccade.errors import UserError
from saccade.storage.folder_config import Pair, Patch, Rate, Side, Strict, Text

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
CLIP, SIGLIP = {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu", "patch_size": 32}, {"layer_norm_eps": 1e-6}
TANH = {"hidden_act": "gelu_pytorch_tanh"}
# What a config of each kind leaves unsaid; a vision tower's own config stands within that of the pair.
KINDS: dict[str, dict[str, Any]] = {
    "vit": {"layer_norm_eps": 1e-12},
    "deit": {"layer_norm_eps": 1e-12},
    "ijepa": {"layer_norm_eps": 1e-12},
    "dinov2": {"layer_norm_eps": 1e-6, "patch_size": 14, "layerscale_value": 1.0, "mlp_ratio": 4},
    "dinov2_with_registers": {
        "layer_norm_eps": 1e-6, "patch_size": 16, "layerscale_value": 1.0, "mlp_ratio": 4, "num_register_tokens": 4,
    },
    "dinov3_vit": {"layer_norm_eps": 1e-5, "layerscale_value": 1.0},
    "clip_vision_model": CLIP,
    "siglip_vision_model": SIGLIP | TANH,
    "siglip2_vision_model": SIGLIP | TANH | {"num_patches": 256},
}  # fmt: skip
TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}


class Config(Strict):
    """What is used of ``config.json``, within bounds."""

    model_config = ConfigDict(extra="ignore")
    model_type: Text
    hidden_size: int = Field(768, ge=1, le=16384)
    num_hidden_layers: int = Field(12, ge=1, le=256)
    num_attention_heads: int = Field(12, ge=1, le=512)
    image_size: Side | Pair = 224
    patch_size: Patch | tuple[Patch, Patch] = 16
    num_channels: int = Field(3, ge=1, le=1024)
    num_patches: int = Field(256, ge=1, le=2**20)
    num_register_tokens: int = Field(0, ge=0, le=1024)
    hidden_act: Literal[*ACTIVATIONS] = "gelu"  # type: ignore[valid-type]
    layer_norm_eps: Annotated[FiniteFloat, Field(ge=0, le=1)] = 1e-6
    rope_theta: Annotated[FiniteFloat, Field(gt=0)] = 100.0
    layerscale_value: Annotated[FiniteFloat, Field(gt=0, le=100)] | None = None
    hidden_dropout_prob: Rate = 0.0
    attention_probs_dropout_prob: Rate = 0.0
    attention_dropout: Rate = 0.0
    drop_path_rate: Rate = 0.0
    id2label: Annotated[dict[Text, Text], Field(max_length=2**24)] | None = None


def is_theirs(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is one of transformers'."""
    return isinstance(config.get("model_type"), str) and "architecture" not in config


def read_config(values: Mapping[str, Any], where: str) -> Config:
    """The vision tower's config. Raises UserError: a kind that has no form in timm, values out of bounds."""
    kind = str(values.get("model_type"))
    if kind in TOWERS and isinstance(values.get("vision_config"), Mapping):
        values = {**values["vision_config"], "model_type": TOWERS[kind], "id2label": values.get("id2label")}
        kind = TOWERS[kind]
    if kind not in KINDS:
        known = ", ".join(k.removesuffix("_vision_model") for k in KINDS)
        raise UserError(f"{where} is a {kind[:50]!r} of transformers; those with a form in timm are {known}")
    labels = values.get("id2label")
    named = {"id2label": {str(k): v for k, v in labels.items()}} if isinstance(labels, Mapping) else {}
    given = {k: v for k, v in values.items() if k in Config.model_fields and v is not None}
    try:
        return Config.model_validate({**KINDS[kind], **given, **named})
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False)[0]
        said = f"{'.'.join(map(str, wrong['loc']))[:100]}={str(wrong.get('input'))[:50]!r}: {wrong['msg'][:150]}"
        raise UserError(f"{where}: its config.json cannot be used ({said})") from None
