"""CUDA graphs: on a GPU they answer as PyTorch does, whoever calls; elsewhere they are refused by name."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from oracles import make_vit, relative
from saccade.core import constant_cache
from saccade.errors import UserError
from saccade.evaluation.speed import bench
from saccade.model import AdaptiveViT
from saccade.runners.captured import GRAPHS
from saccade.runners.runner import Runner

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch sees")
SETTINGS = ["dense", "tome(r=2)", "evit(0.6)", "imagepiece(p=0.6, merge=0.2) | evit(0.8)", "quadtree(13)", "topk(0.5)"]


def model(setting: str, device: str = "cpu") -> AdaptiveViT:
    return AdaptiveViT(make_vit(depth=3), setting).to(device).eval()


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).cuda()


def test_no_gpu_is_said() -> None:
    with pytest.raises(UserError, match="a CUDA graph needs a GPU, and the model is on cpu"):
        model("dense").runner("cudagraph")
    with pytest.raises(UserError, match="a CUDA graph needs a GPU, and the model is on cpu"):
        bench(model("dense"), [], batch=[1], runner="cudagraph", seconds=0)


def test_a_model_that_is_deployed_so_runs_elsewhere_and_says_it() -> None:
    plain = model("tome(r=2)")
    seen = torch.randn(2, 3, 64, 64)
    with pytest.warns(RuntimeWarning, match="CUDA graph does not work here, so it runs fp32 eager"):
        found = plain.deploy("cudagraph")(seen).logits
    assert torch.equal(found, plain(seen).logits)


def test_a_folder_says_it() -> None:
    runner = Runner.of("bf16 cudagraph")
    assert str(runner) == "bf16 cudagraph" and Runner.of(runner.to_dict()) == runner


def test_constants_that_are_given_in_a_block_are_held() -> None:
    plain = model("quadtree(13)")
    with constant_cache.held() as outer:
        with constant_cache.held() as inner:
            plain(torch.randn(1, 3, 64, 64))
        first = len(inner)
        plain(torch.randn(1, 3, 64, 64))
    assert first > 0 and len(inner) == first and len(outer) == first


@on_gpu
@torch.no_grad()
@pytest.mark.parametrize("setting", SETTINGS)
def test_it_answers_as_pytorch_does(setting: str) -> None:
    plain = model(setting, "cuda")
    session = plain.runner("cudagraph")
    for count in (1, 3, 1, 2, 3):
        seen = images(count, count)
        assert relative(session(seen), plain(seen).logits) <= 1e-5
    kept = session(images(2, 7))
    session(images(2, 8))
    assert relative(kept, plain(images(2, 7)).logits) <= 1e-5  # the next call does not write over it


@on_gpu
@torch.no_grad()
def test_threads_take_turns() -> None:
    plain = model("tome(r=2)", "cuda")
    session = plain.runner("cudagraph")
    given = [images(1 + i % 2, i) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(session, given))
    assert max(relative(f, plain(g).logits) for f, g in zip(found, given, strict=True)) <= 1e-5


@on_gpu
@torch.no_grad()
def test_constants_outlive_the_cache() -> None:
    plain = model("quadtree(13)", "cuda")
    session, seen = plain.runner("cudagraph"), images(2)
    before = session(seen)
    constant_cache.forget()
    torch.cuda.empty_cache()
    spoiled = [torch.full((2**16,), -1, device="cuda") for _ in range(64)]
    assert torch.equal(session(seen), before) and spoiled


@on_gpu
@torch.no_grad()
def test_the_ninth_size_says_that_it_is_slow() -> None:
    plain = model("dense", "cuda")
    session = plain.runner("cudagraph")
    for count in range(1, GRAPHS + 1):
        session(images(count))
    with pytest.warns(RuntimeWarning, match="run operator by operator"):
        assert relative(session(images(20)), plain(images(20)).logits) <= 1e-5


@on_gpu
def test_counts_that_differ_are_refused() -> None:
    with pytest.raises(UserError, match=r"those of ats\(.*\) differ from image to image"):
        model("ats(0.7)", "cuda").runner("cudagraph")


@on_gpu
def test_a_gradient_of_the_images_is_not_lost() -> None:
    session, seen = model("dense", "cuda").runner("cudagraph"), images(1).requires_grad_()
    session(seen).sum().backward()
    assert seen.grad is not None and seen.grad.abs().sum() > 0
