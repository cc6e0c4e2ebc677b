"""Scorers of the quadtree against slow obvious oracles, and the published numbers on fifty photos."""

from __future__ import annotations

import io
import threading
import zipfile
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from oracles import busy_images, counted_macs, make_vit, relative
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.tokenizers.mosaic.geometry import Geometry, Mosaic
from saccade.tokenizers.mosaic.pyramid import bilinear, box
from saccade.tokenizers.resize.resampling import ResizeSpec, resize_positions
from saccade.tokenizers.scorers import (
    base,
    build_scorer,
    given,
    gradcam,
    list_scorers,
    networks,
    register_scorer,
)
from saccade.tokenizers.scorers.gate import credit

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RANDOM = "weights='random'"
ALL = [
    "pixel",
    "pixel(weight='mean', blur='bilinear')",
    "entropy",
    "laplacian",
    "laplacian('std')",
    "laplacian('max')",
    "random(3)",
    "attention(2)",
    "gate",
    f"feature({RANDOM})",
    f"gradcam('resnet18', {RANDOM})",
]


def make(size: int = 128, **shape) -> nn.Module:
    """A small ViT that wants its images as ImageNet's are normalised."""
    vit = make_vit("vit", img_size=size, **shape)
    vit.pretrained_cfg = {**vit.pretrained_cfg, "mean": IMAGENET[0], "std": IMAGENET[1]}
    return vit.requires_grad_(False)


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in IMAGENET)
    return (pixels - mean) / std


def scores_of(vit, scorer: str, images: Tensor, sizes: tuple[int, ...] = (16, 32, 64)) -> list[Tensor]:
    """Scores of the splittable levels, the coarsest first."""
    tokenizer = AdaptiveViT(vit, f'quadtree(threshold=0.0, sizes={sizes}, scorer="{scorer}")').tokenizer
    with torch.no_grad():
        return tokenizer.scorer(tokenizer._scene(vit, images))


@pytest.fixture(scope="module")
def vit():
    return make()


@pytest.fixture
def images(vit):
    return busy_images(vit, 3)


def test_every_scorer_is_listed_and_says_what_it_is():
    known = list_scorers()
    assert {text.split("(")[0] for text in ALL} | {"maps"} <= set(known)
    assert all(len(line) > 20 for line in known.values())


@pytest.mark.parametrize("scorer", ALL)
@torch.no_grad()
def test_every_scorer_gives_finite_scores_a_batch_at_a_time_and_says_what_it_cost(vit, images, scorer):
    scores = scores_of(vit, scorer, images)
    assert [tuple(s.shape) for s in scores] == [(3, 2, 2), (3, 4, 4)]
    assert all(s.isfinite().all() and s.dtype == torch.float32 for s in scores)
    for b in range(3):
        for whole, alone in zip(scores, scores_of(vit, scorer, images[b : b + 1]), strict=True):
            assert relative(alone, whole[b : b + 1]) <= 1e-4
    model = AdaptiveViT(vit, f'quadtree(31, scorer="{scorer}")')
    assert float(model(images).trace.macs().sum()) == pytest.approx(counted_macs(lambda: model(images)), rel=1e-3)


# --- pixel ----------------------------------------------------------------------------------------------------------


def test_halving_and_quartering_without_antialiasing():
    x = torch.randn(2, 3, 64, 96)
    assert relative(bilinear(x, 2), F.interpolate(x, scale_factor=0.5, mode="bilinear")) < 1e-6
    assert relative(bilinear(x, 2), F.avg_pool2d(x, 2)) < 1e-6
    central = x.unflatten(2, (16, 4)).unflatten(4, (24, 4))[:, :, :, 1:3, :, 1:3].mean((3, 5))
    assert relative(bilinear(x, 4), central) < 1e-6
    for times in (2, 4, 8):
        assert relative(bilinear(x, times), F.interpolate(x, scale_factor=1 / times, mode="bilinear")) < 1e-6
        assert relative(box(x, times), F.avg_pool2d(x, times)) < 1e-6
    odd = torch.randn(1, 1, 27, 21)
    assert bilinear(odd, 4).shape == box(odd, 4).shape == (1, 1, 6, 5)


@pytest.mark.parametrize("blur", ["box", "bilinear"])
@pytest.mark.parametrize(("weight", "power"), [("mean", 0), ("edge", 1), ("area", 2)])
@pytest.mark.parametrize("size", [(128, 128), (112, 176)])
def test_pixel_scores_are_the_error_of_small_and_large_again(vit, blur, weight, power, size):
    images = busy_images(vit, 2, size)
    for score, times in zip(scores_of(vit, f"pixel('{weight}', '{blur}')", images), (4, 2), strict=True):
        edge = 16 * times
        x = images[..., : size[0] // edge * edge, : size[1] // edge * edge]
        if blur == "box":
            again = F.interpolate(F.avg_pool2d(x, times), scale_factor=times, mode="nearest")
        else:
            again = F.interpolate(
                F.interpolate(x, scale_factor=1 / times, mode="bilinear"), size=x.shape[-2:], mode="bilinear"
            )
        expected = F.avg_pool2d((x - again).square().mean(1), edge) * edge**power
        assert relative(score, expected) <= 1e-5


def test_a_flat_image_scores_nothing_at_all(vit):
    flat = torch.tensor([0.1, -0.7, 2.3])[None, :, None, None].expand(2, 3, 128, 128)
    for scorer in ("pixel", "pixel(blur='bilinear')", "laplacian"):
        assert all(float(s.abs().max()) == 0 for s in scores_of(vit, scorer, flat))


# --- entropy and edges ----------------------------------------------------------------------------------------------


def entropy_by_hand(patch: np.ndarray) -> float:
    grey = patch[..., 0] * np.float32(0.2989) + patch[..., 1] * np.float32(0.5870) + patch[..., 2] * np.float32(0.1140)
    counts, _ = np.histogram(grey, bins=512, range=(0, 255))
    p = counts / counts.sum()
    return float(-(p * np.log2(p + 1e-10)).sum())


def test_entropy_of_known_patches(vit):
    flat = np.full((128, 128, 3), 77, np.uint8)
    ramp = np.broadcast_to(
        np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(4, 0).repeat(4, 1)[..., None], (64, 64, 3)
    )
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    mixed = flat.copy()
    mixed[:64, :64] = ramp
    pixels = torch.from_numpy(np.stack([flat, mixed, noise])).permute(0, 3, 1, 2) / 255
    coarse, fine = scores_of(vit, "entropy", normalised(pixels))
    assert float(coarse[0].abs().max()) <= 1e-6 and float(fine[0].abs().max()) <= 1e-6
    assert float(coarse[1, 0, 0]) == pytest.approx(8.0, abs=1e-4), "256 grey levels, all as often"
    for y in range(4):
        for x in range(4):
            expected = entropy_by_hand(noise[32 * y : 32 * y + 32, 32 * x : 32 * x + 32].astype(np.float32))
            assert float(fine[2, y, x]) == pytest.approx(expected, abs=0.02)
    assert float(coarse[2, 1, 1]) == pytest.approx(entropy_by_hand(noise[64:, 64:].astype(np.float32)), abs=0.02)


def test_entropy_of_a_batch_is_that_of_its_images_to_the_last_bit(vit):
    images = busy_images(vit, 4)
    for whole, *alone in zip(
        scores_of(vit, "entropy", images), *(scores_of(vit, "entropy", i[None]) for i in images), strict=True
    ):
        assert torch.equal(whole, torch.cat(alone))


def test_entropy_does_not_care_how_the_model_wants_its_images(vit):
    """The scorer undoes the normalisation: 8-bit photos score the same for every ViT."""
    pixels = torch.randint(0, 256, (2, 3, 128, 128), generator=torch.Generator().manual_seed(0)) / 255
    other = make_vit("vit", img_size=128)
    mean, std = (torch.tensor(other.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    first, second = scores_of(vit, "entropy", normalised(pixels)), scores_of(other, "entropy", (pixels - mean) / std)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(
        relative(a, b) <= 1e-4
        for a, b in zip(
            *(scores_of(v, "laplacian", x) for v, x in ((vit, normalised(pixels)), (other, (pixels - mean) / std))),
            strict=True,
        )
    )


@pytest.mark.parametrize("sizes", [(4, 8, 16), (16, 32, 64)])
def test_entropy_needs_no_one_hot_picture(vit, sizes):
    """No tensor of more than 16 numbers a pixel; the published batch form takes 512."""

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            out = operator(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not operator.is_view:
                self.most = max(self.most, out.numel() * out.element_size() / 4)
            return out

    with Largest() as seen:
        seen.most = 0
        scores_of(vit, "entropy", torch.zeros(2, 3, 128, 128), sizes)
    assert seen.most <= 16 * 2 * 128 * 128


@pytest.mark.parametrize("statistic", ["mean", "std", "max"])
def test_laplacian(vit, statistic):
    images = busy_images(vit, 2)
    mean, std = (torch.tensor(v)[:, None, None] for v in IMAGENET)
    grey = ((images * std + mean) * 255 * torch.tensor([0.2989, 0.5870, 0.1140])[:, None, None]).sum(1)
    edges = torch.zeros_like(grey)
    padded = F.pad(grey[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    for dy in range(3):
        for dx in range(3):
            edges += (9 * (dy == dx == 1) - 1) * padded[:, dy : dy + 128, dx : dx + 128]
    edges = edges.abs()
    for score, edge in zip(scores_of(vit, f"laplacian('{statistic}')", images), (64, 32), strict=True):
        for y in range(128 // edge):
            for x in range(128 // edge):
                block = edges[:, edge * y : edge * y + edge, edge * x : edge * x + edge].flatten(1)
                expected = {"mean": block.mean(1), "std": block.std(1, correction=0), "max": block.amax(1)}[statistic]
                assert relative(score[:, y, x], expected) <= 1e-2, "grey levels in eighths"


# --- feature --------------------------------------------------------------------------------------------------------


def test_the_papers_network():
    net = networks.open_network("shufflenet_v2_x0_5", 32, "random")
    assert sum(p.numel() for p in net.cpu.parameters()) == 341_792
    with torch.no_grad():
        assert net.cpu(torch.zeros(1, 3, 256, 256)).shape == (1, 1024, 8, 8)
    assert net.macs(256, 256) / 1e6 == pytest.approx(51.53, abs=0.01)
    assert net.macs(224, 224) / 1e6 == pytest.approx(39.45, abs=0.01)
    half = networks.open_network("shufflenet_v2_x0_5", 16, "random")
    assert half.macs(256, 256) / 1e6 == pytest.approx(31.6, abs=0.05)
    scene = Geometry.of((16, 16), (16, 32, 64))
    scorer = build_scorer(f"feature({RANDOM})", AdaptiveViT(make(256)).backbone)
    assert scorer.macs(None, scene) / 1e9 == pytest.approx(0.155, abs=0.001), "three passes"
    assert not net.cpu.training and not any(p.requires_grad for p in net.cpu.parameters())


@torch.no_grad()
@pytest.mark.parametrize("metric", ["mse", "cosine"])
def test_scores_are_the_change_of_features_pass_by_pass(metric):
    vit = make(256)
    images = busy_images(vit, 2)
    net = networks.open_network("shufflenet_v2_x0_5", 32, "random").cpu

    def features(x: Tensor) -> Tensor:  # the ViT's normalisation is already ImageNet's
        return net(x)

    def blurred(times: int) -> Tensor:
        small = F.interpolate(images, scale_factor=1 / times, mode="bilinear")
        return F.interpolate(small, scale_factor=float(times), mode="bilinear")

    def change(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean(1) if metric == "mse" else 1 - F.cosine_similarity(a, b, dim=1)

    coarse, fine = scores_of(vit, f"feature(metric='{metric}', {RANDOM})", images)
    sharp = features(images)
    assert relative(fine, change(features(blurred(2)), sharp)) <= 1e-3, "a block of 32 pixels is a place of the map"
    assert relative(coarse, F.avg_pool2d(change(features(blurred(4)), sharp), 2)) <= 1e-3, "64 pixels: mean of four"


def test_detail_in_one_corner_changes_scores_near_it_alone():
    vit = make(512)
    images = torch.zeros(1, 3, 512, 512)
    images[..., :128, :128] = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    _, fine = scores_of(vit, f"feature(stride=8, {RANDOM})", images)
    assert float(fine[0, 10:, 10:].abs().max()) <= 1e-6 * float(fine[0, :4, :4].min()) + 1e-12


@torch.no_grad()
@pytest.mark.parametrize(
    ("knobs", "sizes", "size"),
    [("stride=16", (8, 16, 32), 128), ("stride=16", (14, 28, 56), 336), ("scale=0.5, stride=16", (16, 32, 64), 128)],
)
def test_smaller_blocks_other_sizes_and_half_the_resolution(knobs, sizes, size):
    """What the published scorer refuses: blocks under 32 pixels, images that 32 does not divide."""
    vit = make(size)
    tokens = Geometry.of((size // sizes[0],) * 2, sizes).coarsest + 12
    model = AdaptiveViT(vit, f'quadtree({tokens}, sizes={sizes}, scorer="feature({knobs}, {RANDOM})")')
    images = busy_images(vit, 1)
    out = model(images)
    assert int(out.trace.first.max()) == tokens - 1
    assert float(out.trace.macs().sum()) == pytest.approx(counted_macs(lambda: model(images)), rel=1e-3)


@torch.no_grad()
def test_a_timm_network_with_its_own_normalisation(vit, images):
    _, fine = scores_of(vit, f"feature('resnet18', stride=16, {RANDOM})", images)
    net = networks.open_network("timm/resnet18", 16, "random")
    assert net.cpu(torch.zeros(1, 3, 64, 64)).shape[2:] == (4, 4) and fine.shape == (3, 4, 4)
    assert net.stats == IMAGENET


@torch.no_grad()
def test_the_first_blocks_of_a_vit_as_network(vit, tmp_path):
    """timm's own blocks on the sharp and the blurred image; weights in timm's own keys."""
    name = "vit_tiny_patch16_224"
    torch.manual_seed(6)
    whole = timm.create_model(name, dynamic_img_size=True).eval()
    save_file(whole.state_dict(), tmp_path / "vit.safetensors")
    images, wanted = busy_images(vit, 2), whole.pretrained_cfg
    pixels = images * torch.tensor(IMAGENET[1])[:, None, None] + torch.tensor(IMAGENET[0])[:, None, None]
    x = (pixels - torch.tensor(wanted["mean"])[:, None, None]) / torch.tensor(wanted["std"])[:, None, None]

    def features(x: Tensor) -> Tensor:
        return whole.forward_intermediates(x, indices=[1], intermediates_only=True, norm=False)[0]

    small = F.interpolate(x, scale_factor=0.5, mode="bilinear")
    change = (features(F.interpolate(small, scale_factor=2.0, mode="bilinear")) - features(x)).square().mean(1)
    scorer = f"feature('{name}', stride=16, blocks=2, weights='{tmp_path}/vit.safetensors')"
    _, fine = scores_of(vit, scorer, images)
    assert relative(fine, F.avg_pool2d(change, 2)) <= 1e-3
    model = AdaptiveViT(vit, f'quadtree(31, scorer="{scorer}")')
    assert float(model(images).trace.macs().sum()) == pytest.approx(counted_macs(lambda: model(images)), rel=1e-3)


@torch.no_grad()
def test_a_network_in_its_fastest_form_gives_the_same():
    net = networks.open_network("shufflenet_v2_x0_5", 32, "random")
    fast, x = net.on(torch.device("cpu")), torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    assert relative(fast(x), net.cpu(x)) <= 1e-4
    trained = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    nn.init.uniform_(trained[1].running_mean), nn.init.uniform_(trained[1].running_var, 0.5, 2.0)
    nn.init.uniform_(trained[1].weight), nn.init.uniform_(trained[1].bias)
    expected = trained(x)
    assert relative(networks._folded(trained)(x), expected) <= 1e-5 and isinstance(trained[1], nn.Identity)


@pytest.mark.parametrize(
    ("scorer", "says"),
    [
        (f"feature('vit_tiny_patch16_224', stride=16, blocks=13, {RANDOM})", r"has not 13 blocks: give fewer"),
        (f"feature('vit_tiny_patch16_224', stride=32, {RANDOM})", r"no maps of stride 32; it has \[16\]"),
        (f"feature('resnet18', stride=16, blocks=2, {RANDOM})", r"is no ViT to be cut after 2 blocks"),
        (f"feature(blocks=0, {RANDOM})", r"blocks=0 is not a whole number"),
        (f"feature(stride=16, scale=0.25, {RANDOM})", r"maps of stride 16 .* blocks of 32 .* at most 8"),
        (f"feature(stride=12, {RANDOM})", r"no maps of stride 12; it has \[4, 8, 16, 32\]"),
        (f"feature('resnet18', stride=64, {RANDOM})", r"no maps of stride 64; it has"),
        (f"feature('resnet19', {RANDOM})", r"neither torchvision nor timm has it \(did you mean 'resnet"),
        (f"feature(scale=0, {RANDOM})", r"scale=0 is not a number in \[0.05, 1\]"),
        (f"feature(metric='l1', {RANDOM})", r"metric='l1' is not one of mse, cosine"),
        ("feature(weights='nowhere.safetensors')", r"there is no weights file 'nowhere.safetensors'"),
        (f"gradcam('resnet18', layer='layer9', {RANDOM})", r"'resnet18' has no module 'layer9'"),
        ("entropy(3)", r"scorer entropy: .*its knobs are \(\)"),
        ("pixel | entropy", r"is not one scorer"),
        ("attention(99)", r"blocks=99 is not a whole number in \[1, 3\]"),
        ("random(-1)", r"seed=-1"),
        ("gate(0)", r"hidden=0"),
        ("laplacian('sum')", r"statistic='sum' is not one of mean, max, std"),
    ],
)
def test_what_makes_no_scorer_is_refused_in_a_line(vit, scorer, says):
    with pytest.raises(UserError, match=says) as error:
        AdaptiveViT(vit, f'quadtree(31, scorer="{scorer}")')
    assert "\n" not in str(error.value)


def test_weights_out_of_reach_are_an_error_with_a_remedy(vit, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("Name or service not known")

    networks._opened.cache_clear()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", unreachable)
    for scorer in ("feature", "gradcam"):
        with pytest.raises(
            UserError, match=r"cannot fetch the weights .*(shufflenet|regnet_y_32gf).*weights='net.safetensors'"
        ):
            AdaptiveViT(vit, f"quadtree(31, scorer='{scorer}')")


@torch.no_grad()
def test_weights_from_a_file(vit, images, tmp_path):
    torch.manual_seed(5)
    whole = torchvision.models.shufflenet_v2_x0_5()
    save_file(whole.state_dict(), tmp_path / "net.safetensors")
    found = networks.open_network("shufflenet_v2_x0_5", 32, str(tmp_path / "net.safetensors")).cpu
    whole.eval()
    x = torch.randn(1, 3, 64, 64)
    assert relative(whole.fc(found(x).mean((2, 3))), whole(x)) <= 1e-5
    scores_of(vit, f"feature(weights='{tmp_path}/net.safetensors')", images)
    save_file({"fc.bias": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"no weights of the scorer network .*: conv1.0.weight and \d+ more"):
        networks.open_network("shufflenet_v2_x0_5", 32, str(tmp_path / "other.safetensors"))


# --- the oracle, maps, attention ------------------------------------------------------------------------------------


def cam_by_hand(trunk, head, x: Tensor, label: int | None) -> Tensor:
    """Grad-CAM of one image, from the two halves of a network."""
    features = trunk(x[None]).detach().requires_grad_()
    logits = head(features)[0]
    (slope,) = torch.autograd.grad(logits[logits.argmax() if label is None else label], features)
    cam = (slope.mean((2, 3), keepdim=True) * features).sum(1).relu()[0].detach()
    return (cam - cam.min()) / (cam.max() - cam.min()).clamp(min=1e-12)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18", "regnet_y_400mf", "timm/convnext_atto"])
def test_class_activation_maps(images, name, labelled):
    net = networks.open_network(name, None, "random")
    layer = gradcam.last_map(name)
    parts = {
        "resnet18": (lambda x: nn.Sequential(*list(net.cpu.children())[:-2])(x), lambda f: net.cpu.fc(f.mean((2, 3)))),
        "timm/resnet18": (net.cpu.forward_features, net.cpu.forward_head) if name.startswith("timm/") else None,
        "regnet_y_400mf": (lambda x: net.cpu.trunk_output(net.cpu.stem(x)), lambda f: net.cpu.fc(f.mean((2, 3)))),
        "timm/convnext_atto": (net.cpu.forward_features, net.cpu.forward_head) if name.startswith("timm/") else None,
    }[name]
    pixels = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 700, 41]) if labelled else None
    with torch.no_grad():
        found = gradcam.class_maps(net, pixels, labels, layer)
    with torch.inference_mode():
        assert torch.equal(gradcam.class_maps(net, pixels, labels, layer), found)
    for b in range(3):
        expected = cam_by_hand(*parts, net.normalised(pixels)[b], None if labels is None else int(labels[b]))
        assert float((found[b] - expected).abs().max()) <= 1e-4
    assert float(found.min()) >= 0 and float(found.max()) <= 1


def test_class_maps_of_transformers_and_of_named_layers(vit, images):
    for scorer in ("timm/vit_tiny_patch16_224", "timm/swin_tiny_patch4_window7_224"):
        big = make(224)
        with torch.no_grad():
            coarse, _ = scores_of(big, f"gradcam('{scorer}', {RANDOM})", busy_images(big, 1))
        assert coarse.shape == (1, 3, 3) and 0 <= float(coarse.min()) < float(coarse.max()) <= 1
    first = scores_of(vit, f"gradcam('resnet18', layer='layer3', {RANDOM})", images)[0]
    assert relative(first, scores_of(vit, f"gradcam('resnet18', {RANDOM})", images)[0]) > 1e-2


@torch.no_grad()
def test_labels_belong_to_a_block_and_a_thread(vit, images):
    model = AdaptiveViT(vit, f"quadtree(31, scorer=\"gradcam('resnet18', {RANDOM})\")")
    labels = [torch.tensor([i, i + 1, i + 2]) for i in range(8)]

    def maps(of: Tensor | None) -> Tensor:
        if of is None:
            return model.tokenizer.mosaic(vit, images).level
        with given(labels=of):
            return model.tokenizer.mosaic(vit, images).level

    expected, found = [maps(of) for of in labels], [None] * 8
    assert len({tuple(m.flatten().tolist()) for m in expected}) > 1
    assert torch.equal(maps(None), maps(None)) and base.current().labels is None

    def work(i: int) -> None:
        with torch.no_grad():
            found[i] = maps(labels[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(UserError, match="2 labels for 3 images"), given(labels=torch.tensor([1, 2])):
        model(images)


@torch.no_grad()
def test_given_maps_of_any_size_are_averaged_over_blocks(vit, images):
    model = AdaptiveViT(vit, "quadtree(31, scorer='maps')")
    maps = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    scores = []
    for given_maps in (maps, maps.repeat_interleave(3, 1).repeat_interleave(3, 2), F.avg_pool2d(maps, 2)):
        with given(maps=given_maps):
            scores.append(scores_of(vit, "maps", images))
            assert model(images).trace.first.max() == 30
    for coarse, fine in scores:
        assert relative(coarse, F.avg_pool2d(maps, 4)) <= 1e-6
        assert relative(fine, F.avg_pool2d(maps, 2)) <= 1e-6
    with given(maps=torch.rand(3, 7, 5)):
        model(images)
    with pytest.raises(UserError, match=r"none were given; .*given\(maps"):
        model(images)
    with pytest.raises(UserError, match=r"maps of shape \(2, 8, 8\) for 3 images"), given(maps=maps[:2]):
        model(images)


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "dinov2-registers", "siglip-average"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_attention_of_a_first_look(family, blocks):
    """timm's own blocks on the halved image, and attention spelled out."""
    vit = make_vit(family, img_size=112 if "dino" in family else 128)
    images, patch = busy_images(vit, 2), vit.patch_embed.patch_size[0]
    small = F.avg_pool2d(images, 2)
    x = AdaptiveViT(vit).tokenizer(vit, small).x
    x = vit.blocks[: blocks - 1](x)
    block = vit.blocks[blocks - 1]
    heads = block.attn.num_heads
    q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    shares = (block.attn.q_norm(q) @ block.attn.k_norm(k).mT * block.attn.scale).softmax(-1).mean(1)
    seen = shares.mean(1) if vit.cls_token is None else shares[:, 0]
    expected = seen[:, vit.num_prefix_tokens :].unflatten(1, (4, 4))
    coarse, fine = scores_of(vit, f"attention({blocks})", images, (patch, 2 * patch, 4 * patch))
    assert relative(fine, expected) <= 1e-4 and relative(coarse, F.avg_pool2d(expected, 2)) <= 1e-4


def test_random_scores_depend_on_seed_and_place_alone(vit, images):
    first, again, other = (scores_of(vit, f"random({seed})", x) for seed, x in ((0, images), (0, -images), (1, images)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    assert torch.equal(first[1][0], first[1][2]) and len(first[1][0].unique()) == 16
    many = torch.cat([scores_of(vit, f"random({seed})", images[:1])[1].flatten() for seed in range(50)])
    assert 0.45 < float(many.mean()) < 0.55 and float(many.min()) >= 0 and float(many.max()) < 1


# --- learned, and one's own -----------------------------------------------------------------------------------------


def test_the_gate_starts_as_the_pixel_scorer_and_learns(vit, images):
    model = AdaptiveViT(vit, "quadtree(31, scorer='gate')")
    with torch.no_grad():
        assert torch.equal(model(images).logits, AdaptiveViT(vit, "quadtree(31)")(images).logits)
    gate = model.tokenizer.scorer
    optimizer = torch.optim.SGD(gate.parameters(), 1.0)
    for _ in range(2):
        optimizer.zero_grad()
        trained = model.train()(images)
        trained.logits.square().sum().backward()
        grads = {name: float(p.grad.abs().sum()) for name, p in gate.named_parameters()}
        optimizer.step()
    assert all(value > 0 for value in grads.values()), "after one step it all learns"
    with torch.no_grad():
        before = AdaptiveViT(vit, "quadtree(31)").tokenizer.mosaic(vit, images)
        nn.init.normal_(gate.out.weight, std=2.0)
        after = model.eval().tokenizer.mosaic(vit, images)
    assert not torch.equal(before.level, after.level)
    again = model(images).logits
    with torch.no_grad():
        assert torch.equal(model(images).logits, again.detach()), "with gradients or without: the same numbers"


def test_credit_is_one_and_its_gradient_that_of_the_leafs_probability():
    g = Geometry.of((4, 4), (16, 32, 64))
    scores = [torch.rand(2, *g.grid(level)) + 0.5 for level in g.splittable]
    scores[1][1] *= 0.1
    split = torch.zeros(2, 5, dtype=torch.bool)
    split[0, 0] = split[0, 2] = True  # image 0: the root, and one of its children; image 1: nothing
    mosaic = Mosaic.of(g, split, None)
    scores = [s.requires_grad_() for s in scores]
    factor = credit(scores, mosaic)
    assert torch.equal(factor, torch.ones_like(factor))
    for image, leaf in ((0, 0), (0, 1), (0, 3), (1, 0)):
        found = torch.autograd.grad(factor[image, leaf], scores, retain_graph=True)

        def chance(coarse: Tensor, fine: Tensor, image: int = image, leaf: int = leaf) -> Tensor:
            root, child = (coarse[image] + 1e-6).log()[0, 0], (fine[image] + 1e-6).log().flatten()
            low = torch.minimum(child, root)
            logs = (torch.cat([root[None], low]) if image == 0 else root[None]).detach()
            edge = (
                logs[split[image][: len(logs)]].min()
                if split[image].any()
                else torch.cat([root[None], low]).max().detach()
            )
            if image == 1:
                return F.logsigmoid(edge - root)
            level = int(mosaic.leaf_level[0, leaf])
            y, x = divmod(int(mosaic.cell[0, leaf]), 4)
            parent = (y // 2) * 2 + x // 2
            return (
                F.logsigmoid(low[parent] - edge)
                if level == 0
                else F.logsigmoid(root - edge) + F.logsigmoid(edge - low[parent])
            )

        expected = torch.autograd.grad(chance(*scores), scores, allow_unused=True)
        for a, b in zip(found, expected, strict=True):
            assert float((a - (torch.zeros_like(a) if b is None else b)).abs().max()) <= 1e-6


@torch.no_grad()
def test_a_function_of_ones_own(vit, images):
    @register_scorer("brightness")
    def brightness(backbone, gain: float = 1.0):
        """How bright a block is."""
        return lambda x, size: gain * F.avg_pool2d(x.mean(1), size)

    @register_scorer("wrong")
    def wrong(backbone):
        """Not what it should be."""
        return lambda x, size: x

    try:
        scores = scores_of(vit, "brightness(gain=2.0)", images)
        assert all(
            relative(s, 2 * F.avg_pool2d(images.mean(1), e)) <= 1e-6 for s, e in zip(scores, (64, 32), strict=True)
        )
        assert AdaptiveViT(vit, "quadtree(31, scorer='brightness')")(images).logits.isfinite().all()
        assert list_scorers()["brightness"] == "How bright a block is."
        with pytest.raises(UserError, match=r"'wrong' gave \(3, 3, 128, 128\) for blocks of 64: give \(3, 2, 2\)"):
            AdaptiveViT(vit, "quadtree(31, scorer='wrong')")(images)
    finally:
        for name in ("brightness", "wrong"):
            base._SCORERS.pop(name)


# --- fifty photos ---------------------------------------------------------------------------------------------------


def photos(data_dir, size: int, how: Image.Resampling) -> Tensor:
    """The shorter side to size / 0.875, and the centre of that: [50, 3, size, size], 0 … 1."""
    found = []
    with zipfile.ZipFile(data_dir / "photos50.zip") as archive:
        for name in sorted(n for n in archive.namelist() if not n.endswith("/")):
            image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            w, h = image.size
            side = int(size / 0.875)
            image = image.resize((side, int(side * h / w)) if w < h else (int(side * w / h), side), how)
            left, top = round((image.width - size) / 2), round((image.height - size) / 2)
            found.append(np.asarray(image.crop((left, top, left + size, top + size))))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def fifty(data_dir):
    return photos(data_dir, 256, Image.Resampling.BILINEAR)


def rebuilt(pixels: Tensor, mosaic: Mosaic, resample: str = "bilinear") -> Tensor:
    """PSNR of each photo, [50] dB: every leaf brought to 16 pixels and back, by itself."""
    out = pixels.clone()
    for level in (1, 2):
        edge = 16 << level
        patches = pixels.unflatten(2, (-1, edge)).unflatten(4, (-1, edge)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        small = (
            F.interpolate(patches, size=(16, 16), mode="bilinear")
            if resample == "bilinear"
            else F.avg_pool2d(patches, 1 << level)
        )
        again = F.interpolate(small, size=(edge, edge), mode="bilinear")
        again = (
            again.unflatten(0, (len(pixels), 256 // edge, 256 // edge)).permute(0, 3, 1, 4, 2, 5).reshape(pixels.shape)
        )
        here = (mosaic.level == level).view(-1, 1, 16, 16).repeat_interleave(16, 2).repeat_interleave(16, 3)
        out = torch.where(here, again, out)
    return -10 * (out - pixels).square().mean((1, 2, 3)).log10()


def mosaic_of(vit, setting: str, pixels: Tensor) -> Mosaic:
    with torch.no_grad():
        return AdaptiveViT(vit, setting).tokenizer.mosaic(vit, normalised(pixels))


PUBLISHED = "scorer=\"pixel(weight='{}', blur='bilinear')\", resample='bilinear'"


@pytest.mark.parametrize(
    ("tokens", "counts"),
    [
        (49, (6.4, 36.0, 6.6)),
        (64, (18.2, 41.2, 4.6)),
        (100, (58.3, 39.1, 2.6)),
        (121, (83.7, 35.4, 1.9)),
        (169, (142.7, 25.6, 0.7)),
        (196, (176.7, 19.1, 0.2)),
    ],
)
def test_leaves_of_each_size_on_photos(fifty, tokens, counts):
    vit = make(256, depth=1)
    found = mosaic_of(vit, f"quadtree({tokens}, {PUBLISHED.format('edge')})", fifty).counts().float().mean(0)
    assert found.tolist() == pytest.approx(counts, abs=0.3)
    ours = mosaic_of(vit, f"quadtree({tokens})", fifty).counts().float().mean(0)
    assert ours.tolist() == pytest.approx(counts, abs=3.0), "boxes split nearly the same blocks"


@pytest.mark.parametrize(
    ("tokens", "edge", "mean", "random", "uniform", "side"),
    [
        (64, 30.78, 30.37, 27.11, 28.75, 128),
        (100, 33.78, 33.41, 28.22, 30.88, 160),
        (169, 40.97, 40.79, 31.38, 33.36, 208),
    ],
)
def test_photos_rebuilt_from_their_mosaics(fifty, tokens, edge, mean, random, uniform, side):
    vit = make(256, depth=1)
    found = {
        w: rebuilt(fifty, mosaic_of(vit, f"quadtree({tokens}, {PUBLISHED.format(w)})", fifty)) for w in ("edge", "mean")
    }
    assert float(found["edge"].mean()) == pytest.approx(edge, abs=0.05)
    assert float(found["mean"].mean()) == pytest.approx(mean, abs=0.05) and mean < edge
    ours = rebuilt(fifty, mosaic_of(vit, f"quadtree({tokens})", fifty))
    assert float(ours.mean()) >= edge - 0.1, "the default scorer is as good"
    blind = rebuilt(fifty, mosaic_of(vit, f"quadtree({tokens}, scorer='random', resample='bilinear')", fifty))
    small = F.interpolate(fifty, size=(side, side), mode="bilinear", antialias=True)
    small = F.interpolate(small, size=(256, 256), mode="bilinear")
    grid = -10 * (small - fifty).square().mean((1, 2, 3)).log10()
    assert float(grid.mean()) == pytest.approx(uniform, abs=0.05)
    assert float(blind.mean()) == pytest.approx(random, abs=1.0), "other seeds, other places"
    for psnr in (found["edge"], ours):
        assert (psnr > blind).all() and (psnr > grid).all(), "on every photo"


@pytest.mark.parametrize(
    ("size", "sizes", "threshold", "mean", "least", "most"),
    [
        (224, (16, 32), 5.5, 171.2, 94, 196),
        (336, (14, 28), 5.5, 476.3, 240, 576),
        (336, (14, 28), 6.0, 441.2, 201, 576),
        pytest.param(336, (14, 28, 56), (5.75, 4.0), 454.2, 186, 576, marks=pytest.mark.slow),
        pytest.param(384, (16, 32), 5.5, 478.7, 243, 576, marks=pytest.mark.slow),
        pytest.param(448, (14, 28, 56), (5.75, 4.0), 773.4, 286, 1024, marks=pytest.mark.slow),
    ],
)
def test_tokens_at_apts_thresholds(data_dir, size, sizes, threshold, mean, least, most):
    """APT's evaluation crops are bicubic."""
    vit = make(size, depth=1, patch_size=sizes[0])
    pixels = photos(data_dir, size, Image.Resampling.BICUBIC)
    counts = mosaic_of(vit, f"quadtree(threshold={threshold}, sizes={sizes})", pixels).valid.sum(1).float()
    assert float(counts.mean()) == pytest.approx(mean, abs=1.0)
    assert abs(int(counts.min()) - least) <= 3 and int(counts.max()) == most


def test_busy_photos_get_more_of_the_batchs_tokens(fifty):
    vit = make(256, depth=1)

    def ranks(x: Tensor) -> Tensor:
        return x.argsort().argsort().double()

    for scorer in ("entropy", "pixel"):
        _, fine = scores_of(vit, scorer, normalised(fifty))
        tokens = mosaic_of(vit, f"quadtree(per_batch=100, scorer='{scorer}')", fifty).valid.sum(1)
        assert int(tokens.sum()) == 100 * 50
        assert float(torch.corrcoef(torch.stack([ranks(fine.mean((1, 2))), ranks(tokens)]))[0, 1]) > 0.85


@pytest.mark.slow
@torch.no_grad()
def test_with_real_weights_more_tokens_are_nearer_to_all_and_pixels_beat_chance(data_dir, fifty):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=256)
    state = {k: v.float() for k, v in load_file(data_dir / "vit_tiny_patch16_224.safetensors").items()}
    state["pos_embed"] = resize_positions(state["pos_embed"], (14, 14), (16, 16), 1, ResizeSpec())
    vit.load_state_dict(state)
    model = AdaptiveViT(vit.eval())
    images = fifty * 2 - 1

    def features(setting: str) -> Tensor:
        return vit.norm(model.at(setting).forward_tokens(images)[0].x[:, 0])

    dense, before = features("dense"), -1.0
    for tokens in (64, 100, 169, 220):
        near = F.cosine_similarity(features(f"quadtree({tokens})"), dense)
        chance = F.cosine_similarity(features(f"quadtree({tokens}, scorer='random')"), dense)
        assert float(near.mean()) > before, "monotone in the tokens"
        if tokens in (64, 169):
            assert float(near.mean()) > float(chance.mean())
        before = float(near.mean())
