"""timm's modules, whose attributes type checkers do not know."""

from __future__ import annotations

from typing import Any

ViT = Any  #       a timm VisionTransformer } nn.Modules whose attributes


TimmBlock = Any  # one of its blocks        } type checkers do not know
