"""Names of before: what people wrote for earlier versions still runs, and says what it is called now."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings

import pytest
import torch

import saccade
from oracles import make_vit
from saccade.renamed.names import MODULES, NAMES


@pytest.mark.parametrize("old", sorted(MODULES))
def test_an_old_module_is_its_successor_and_warns(old):
    sys.modules.pop(f"saccade.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"saccade\.{old} is saccade\.{MODULES[old]} now"):
        module = importlib.import_module(f"saccade.{old}")
    new = importlib.import_module(f"saccade.{MODULES[old]}")
    names = [n for n, value in vars(new).items() if getattr(value, "__module__", "") == new.__name__ and n[0] != "_"]
    assert all(getattr(module, name) is getattr(new, name) for name in names)
    with pytest.raises(AttributeError, match="no 'no_such_name'"):
        _ = module.no_such_name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("old", sorted(NAMES))
def test_an_old_name_is_found_where_it_was(old):
    module, _, name = old.rpartition(".")
    home, _, new = NAMES[old].rpartition(".")
    found = getattr(importlib.import_module(f"saccade.{module}"), name)
    assert found is getattr(importlib.import_module(f"saccade.{home}"), new)


def test_old_methods_of_a_model_give_what_new_ones_give():
    vit = make_vit()
    model = saccade.AdaptiveViT(vit, "tome(r=2)").eval()
    images = torch.randn(2, 3, *model.input_size())
    with torch.inference_mode():
        with pytest.warns(DeprecationWarning, match="AdaptiveViT.dense is feature_map now"):
            assert torch.equal(model.dense(images), model.feature_map(images))
        with pytest.warns(DeprecationWarning, match="AdaptiveViT.encode is forward_tokens now"):
            tokens, _ = model.encode(images)
        with pytest.warns(DeprecationWarning, match="AdaptiveViT.head is forward_head now"):
            logits = model.head(tokens)
        assert torch.equal(logits, model.forward_head(tokens))


def test_new_names_do_not_warn():
    code = "import saccade, saccade.core.plan; [getattr(saccade, name) for name in saccade._HOME]"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:saccade", "-c", code], check=True, timeout=120)


def test_nothing_is_shadowed():
    """No old name is that of a module which is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not any(importlib.import_module(f"saccade.{old}").__spec__.origin for old in MODULES)
