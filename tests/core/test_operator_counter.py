"""The operator counter against arithmetic, whatever torch's version and the processor's instructions."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from oracles import make_vit, vit_macs
from saccade.core.operator_counter import counted_macs
from saccade.data import Preprocess
from saccade.tokenizers.scorers.networks import open_network
from saccade.training.loss import Teacher


def heads(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("queries", [1, 7])
def test_attention(dtype: torch.dtype, mask: bool, queries: int) -> None:
    q, k, v = (heads(2, 3, n, 8).to(dtype) for n in (queries, 7, 7))
    bias = torch.zeros(2, 1, 1, 7, dtype=dtype) if mask else None
    with torch.no_grad():
        found = counted_macs(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    assert found == 2 * (2 * 3 * queries * 7 * 8)


def test_attention_with_its_gradient() -> None:
    """Two products forward; backward four, and the scores again where the kernel does not keep them."""
    q, k, v = (heads(2, 3, 7, 8, grad=True) for _ in range(3))
    found = counted_macs(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert found in (6 * 2 * 3 * 7 * 7 * 8, 7 * 2 * 3 * 7 * 7 * 8)


@pytest.mark.parametrize("grad", [False, True], ids=["fused", "step by step"])
def test_torchs_own_attention_module(grad: bool) -> None:
    """Without a gradient torch runs it as one operator."""
    layer, x = nn.MultiheadAttention(16, 4, batch_first=True).eval(), torch.randn(2, 5, 16)
    with torch.set_grad_enabled(grad):
        found = counted_macs(lambda: layer(x, x, x, need_weights=False))
    assert found == 2 * (4 * 5 * 16**2 + 2 * 5**2 * 16)


@pytest.mark.parametrize("grad", [False, True], ids=["fused", "step by step"])
def test_torchs_own_encoder_layer(grad: bool) -> None:
    layer, x = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval(), torch.randn(2, 5, 16)
    with torch.set_grad_enabled(grad):
        found = counted_macs(lambda: layer(x))
    assert found == 2 * (4 * 5 * 16**2 + 2 * 5**2 * 16 + 2 * 5 * 16 * 24)


@pytest.mark.parametrize("grad", [False, True], ids=["fused", "step by step"])
def test_a_recurrent_layer(grad: bool) -> None:
    """Four gates, each of the input and of the state; twice, for both directions."""
    layer, x = nn.LSTM(6, 5, batch_first=True, bidirectional=True), torch.randn(3, 4, 6)
    with torch.set_grad_enabled(grad):
        found = counted_macs(lambda: layer(x))
    assert found == 2 * 3 * 4 * 4 * 5 * (6 + 5)


def test_products_with_vectors() -> None:
    matrix, vector, batch = torch.randn(5, 3), torch.randn(3), torch.randn(2, 5, 3)
    assert counted_macs(lambda: matrix @ vector) == 15
    assert counted_macs(lambda: F.linear(vector, matrix, torch.zeros(5))) == 15
    assert counted_macs(lambda: vector @ vector) == 3
    assert counted_macs(lambda: torch.addbmm(torch.zeros(5, 5), batch, batch.mT)) == 2 * 5 * 3 * 5


def test_a_teachers_macs() -> None:
    """A ViT of three blocks, at its own size, whatever the student's."""
    small = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=10).eval()
    teacher = Teacher(small, Preprocess.of(make_vit()))
    # Resizing the student's image has no product.
    assert teacher.macs == vit_macs([197] * 3, 196, 192, classes=10)


def test_a_teacher_that_torch_runs_in_whole_layers() -> None:
    """Sequencer is LSTMs, which a processor runs as one operator."""
    net = timm.create_model("sequencer2d_s", num_classes=10, img_size=56, layers=(1, 1, 1, 1)).eval()
    images = torch.zeros(1, 3, 56, 56)
    with torch.no_grad():
        whole = counted_macs(lambda: net(images))
    assert whole == counted_macs(lambda: net(images))  # with gradients asked for: step by step


def test_a_scorer_networks_macs() -> None:
    network = open_network("timm/vit_tiny_patch16_224", 16, "random", blocks=2)
    assert network.macs(224, 224) == vit_macs([197] * 2, 196, 192, classes=0)
