"""Other libraries' layers inside of a ViT, and what users do to models, under a setting."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from oracles import make_images, make_vit, relative
from saccade.model import AdaptiveViT

SHAPE = {"depth": 4, "embed_dim": 64, "num_heads": 4}
SETTINGS = ("", "evit(0.5)", "tome(r=2)", "imagepiece()", "dynamicvit(0.7)", "adavit(0.7)", "topk(0.5)", "ats()")


def adapted(vit: nn.Module) -> nn.Module:
    """LoRA as PEFT puts it there, with weights that matter."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(r=4, target_modules=["qkv", "proj", "fc1", "fc2"], exclude_modules=r"patch_embed\..*")
    peft.inject_adapter_in_model(config, vit)
    for name, weight in vit.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    return vit


def merged(vit: nn.Module) -> nn.Module:
    """The same function in plain layers, by PEFT's own arithmetic."""
    plain = copy.deepcopy(vit)
    for path, module in [*plain.named_modules()]:
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge()
            owner, _, name = path.rpartition(".")
            setattr(plain.get_submodule(owner), name, module.base_layer)
    return plain


@torch.no_grad()
@pytest.mark.parametrize("setting", SETTINGS)
def test_lora_by_peft_gives_what_its_merged_weights_give(setting):
    vit = make_vit("vit", **SHAPE)
    before = AdaptiveViT(copy.deepcopy(vit), setting).eval()
    vit = adapted(vit).eval()
    model, images = AdaptiveViT(vit, setting, learned=before.learned).eval(), make_images(vit)
    expected = AdaptiveViT(merged(vit), setting, learned=before.learned).eval()(images).logits
    assert relative(model(images).logits, expected) <= 1e-4
    assert relative(before(images).logits, expected) > 1e-3


def test_lora_by_peft_trains_under_a_setting():
    """Only the adapters change, and the loss falls."""
    torch.manual_seed(0)
    vit = adapted(make_vit("vit", **SHAPE))
    model, images = AdaptiveViT(vit, "tome(r=2)").train(), make_images(vit)
    labels = torch.arange(len(images)) % vit.num_classes
    kept = {name: value.clone() for name, value in vit.named_parameters() if "lora" not in name}
    tuned = [value for name, value in vit.named_parameters() if "lora" in name]
    assert all(value.requires_grad for value in tuned)
    step, losses = torch.optim.Adam(tuned, lr=1e-2), []
    for _ in range(8):
        step.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(value, kept[name]) for name, value in vit.named_parameters() if "lora" not in name)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
@pytest.mark.parametrize("setting", SETTINGS)
def test_weights_of_eight_bits_by_torchao(setting):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    vit = make_vit("vit", **SHAPE).eval()
    images, before = make_images(vit), AdaptiveViT(copy.deepcopy(vit), setting).eval()
    quantize_(vit, Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, nn.Linear))
    plain = copy.deepcopy(vit)
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    model = AdaptiveViT(vit, setting, learned=before.learned).eval()
    expected = AdaptiveViT(plain, setting, learned=before.learned).eval()(images).logits
    assert relative(model(images).logits, expected) <= 1e-3
    assert relative(before(images).logits, expected) > 1e-5


@torch.no_grad()
@pytest.mark.parametrize("setting", SETTINGS)
def test_channels_last_and_a_deep_copy(setting):
    vit = make_vit("vit", **SHAPE).eval()
    model, images = AdaptiveViT(vit, setting).eval(), make_images(vit)
    expected = model(images).logits
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert relative(other(images.to(memory_format=torch.channels_last)).logits, expected) <= 1e-5
    for value in other.parameters():
        value.zero_()
    assert torch.equal(model(images).logits, expected)  # nothing is shared with a copy


@pytest.mark.parametrize("setting", ["tome(r=2)", "evit(0.5)", "dynamicvit(0.7)"])
def test_an_average_of_weights_is_seen_by_views(setting):
    """torch's averaged model: its views run the averaged weights, also after the next update."""
    vit = make_vit("vit", **SHAPE)
    model, images = AdaptiveViT(vit, setting), make_images(vit)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    view = average.module.at("dense").eval()
    for _ in range(2):
        with torch.no_grad():
            [value.add_(0.1 * torch.randn_like(value)) for value in vit.parameters()]
        average.update_parameters(model)
    with torch.no_grad():
        plain = copy.deepcopy(average.module.vit).eval()
        assert relative(view(images).logits, plain(images)) <= 1e-5
        assert relative(view(images).logits, vit.eval()(images)) > 1e-3


@torch.no_grad()
def test_weights_that_are_tied():
    """Two blocks that are one module, and a head that is another's: shared before, shared after a copy."""
    vit = make_vit("vit", **SHAPE).eval()
    vit.blocks[2].mlp, vit.blocks[3].attn.qkv = vit.blocks[1].mlp, vit.blocks[0].attn.qkv
    images, model = make_images(vit), AdaptiveViT(vit, "tome(r=0) | tome(r=0)").eval()
    assert relative(model(images).logits, vit(images)) <= 1e-5
    other = copy.deepcopy(model.at("tome(r=2)"))
    assert other.vit.blocks[2].mlp is other.vit.blocks[1].mlp
    assert relative(other(images).logits, model.at("tome(r=2)")(images).logits) <= 1e-6


def test_a_gradient_by_data_parallel(tmp_path):
    """The user's own DDP around a model, of one process: gradients are those without."""
    vit = make_vit("vit", **SHAPE)
    images, expected = make_images(vit), copy.deepcopy(vit)
    AdaptiveViT(expected, "evit(0.5)").train()(images).logits.sum().backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(AdaptiveViT(vit, "evit(0.5)").train())
        wrapped(images).logits.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for (name, one), two in zip(vit.named_parameters(), expected.parameters(), strict=True):
        assert relative(one.grad, two.grad) <= 1e-5, name
