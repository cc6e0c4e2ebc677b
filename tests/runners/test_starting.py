"""``torch.compile`` as a runner: one whole graph a setting and size of batch, and no silent way back to eager."""

from __future__ import annotations

import warnings

import pytest
import torch

from oracles import make_images, make_vit, relative
from saccade.model import AdaptiveViT
from saccade.runners import starting
from slow_cases import cases


@pytest.fixture
def graphs(monkeypatch) -> list:
    """The graphs that are made, by a compiler that runs them as they are."""
    made: list = []
    compiler = torch.compile

    def note(graph, example):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=note, **how))
    return made


@torch.no_grad()
@pytest.mark.slow
def test_more_models_than_torch_keeps_variants_of_one_function(graphs):
    base = AdaptiveViT(make_vit("vit")).eval()
    images = make_images(base.vit, 2)
    for i in range(1, 11):  # torch runs the ninth eagerly, and logs it
        model = base.at(f"evit({i / 12:.2f})")
        assert relative(model.runner("compile")(images), model(images).logits) <= 1e-5
        assert len(graphs) == i


@torch.no_grad()
@pytest.mark.parametrize(
    "setting", cases([("tome(r=2)",)], [("tome(r=2)",), ("adavit()",), ("imagepiece(p=0.6, merge=0.2)",)])
)
def test_one_graph_for_each_size_of_batch(graphs, setting):
    model = AdaptiveViT(make_vit("vit"), setting).eval()
    session = model.runner("compile")
    for count in (1, 2, 1, 3, 2):
        session(make_images(model.vit, count))
    assert len(graphs) == 3


@torch.no_grad()
def test_sizes_beyond_the_graphs_run_eagerly_and_say_so(graphs, monkeypatch):
    monkeypatch.setattr(starting, "GRAPHS", 2)
    model = AdaptiveViT(make_vit("vit"), "evit(0.5)").eval()
    session = model.runner("compile")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile has made")
        for count in (1, 2):
            session(make_images(model.vit, count))
    images = make_images(model.vit, 3)
    with pytest.warns(RuntimeWarning, match=r"made 2 graphs of evit\(0.5\), so batches of 3 run operator by operator"):
        assert relative(session(images), model(images).logits) <= 1e-5
    assert len(graphs) == 2
