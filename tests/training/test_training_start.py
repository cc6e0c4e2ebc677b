"""What training starts from: whose head is kept, and whose is left out."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import saccade
from saccade.backbones.vit import class_names_of, set_class_names
from saccade.errors import UserError
from saccade.training.config import Source
from saccade.training.starting import open_source

SHAPE = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3}


@pytest.fixture
def seven():
    """A model of seven classes that have names."""
    torch.manual_seed(0)
    model = saccade.create_model("vit_tiny_patch16_224", num_classes=7, **SHAPE)
    set_class_names(model.vit, list("abcdefg"))
    return model


def test_weights_with_another_head_say_how_to_leave_it_out(seven, tmp_path):
    save_file(seven.vit.state_dict(), tmp_path / "w.safetensors")
    source = Source(weights=str(tmp_path / "w.safetensors"), args=SHAPE)
    with pytest.raises(UserError, match=r"its head has 7 classes: .*\(saccade train: --new-head\)"):
        open_source(source)
    started = open_source(source.model_copy(update={"new_head": True}))
    assert started.num_classes == 0
    for name, value in started.vit.state_dict().items():
        assert torch.equal(value, seven.vit.state_dict()[name]), name


def test_a_folder_keeps_its_head_unless_a_new_one_is_asked_for(seven, tmp_path):
    seven.save(tmp_path / "model")
    kept = open_source(Source(name=str(tmp_path / "model")))
    assert torch.equal(kept.vit.head.weight, seven.vit.head.weight)
    started = open_source(Source(name=str(tmp_path / "model"), new_head=True))
    assert started.num_classes == 0 and class_names_of(started.vit) is None
    assert torch.equal(started.vit.blocks[0].attn.qkv.weight, seven.vit.blocks[0].attn.qkv.weight)
