"""Multiply-accumulates by torch's operator counter, with formulas of our own where the installed version lacks one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

Shape = Sequence[int]


def counted_macs(run: Callable[[], object]) -> int:
    """Multiply-accumulates of what ``run()`` computes, gradients included where it asks for them.

    The count is of operators, not of kernels: the same on every processor and on every supported torch.
    """
    with FlopCounterMode(display=False, custom_mapping=_missing()) as counter:
        run()
    return counter.get_total_flops() // 2


def _missing() -> dict:
    """The formulas below whose operator this torch has and does not count."""
    packets = {getattr(torch.ops.aten, name, None): formula for name, formula in FORMULAS.items()}
    return {op: formula for op, formula in packets.items() if op is not None and op not in flop_registry}


# Each takes the shapes of an operator's tensors and gives its FLOPs, two a multiply-accumulate.


def _attention(query: Shape, key: Shape, value: Shape, *rest: object, **more: object) -> int:
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *rest: object, **more: object) -> int:
    # The scores again, and gradients of query and key: width of the query; of shares and value: width of the value.
    return 2 * prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _whole_attention(query: Shape, key: Shape, value: Shape, width: int, *rest: object, **more: object) -> int:
    projections = 2 * width**2 * (2 * prod(query[:-1]) + prod(key[:-1]) + prod(value[:-1]))
    return projections + 4 * prod(query[:-1]) * key[-2] * width


def _whole_layer(source: Shape, width: int, heads: int, *rest: Shape, **more: object) -> int:
    widening, narrowing = rest[11], rest[13]  # the MLP's weights
    return _whole_attention(source, source, source, width) + 2 * prod(source[:-1]) * (prod(widening) + prod(narrowing))


def _recurrent(source: Shape, from_input: Shape, from_state: Shape, *rest: object, **more: object) -> int:
    return 2 * prod(source[:-1]) * (prod(from_input) + prod(from_state))


def _vector(matrix: Shape, vector: Shape, *rest: object, **more: object) -> int:
    return 2 * prod(matrix)


def _added_vector(start: Shape, matrix: Shape, vector: Shape, *rest: object, **more: object) -> int:
    return 2 * prod(matrix)


def _added_batch(start: Shape, left: Shape, right: Shape, *rest: object, **more: object) -> int:
    return 2 * prod(left) * right[-1]


FORMULAS: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "_scaled_dot_product_attention_math_for_mps": _attention,
    # What ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` call where no gradient is asked for.
    "_native_multi_head_attention": _whole_attention,
    "_transformer_encoder_layer_fwd": _whole_layer,
    "mkldnn_rnn_layer": _recurrent,
    "mv": _vector,
    "dot": _vector,
    "addmv": _added_vector,
    "addbmm": _added_batch,
}
