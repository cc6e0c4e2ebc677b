"""The three rotations that a merged token may have, side by side: how near embeddings stay to the dense ones, and cost.

    python benchmarks/rotation_forms.py --images photos/ --weights dinov3.safetensors
    python benchmarks/rotation_forms.py --seconds 10          (random weights and images, and time)

Without ``--weights`` they are random, and scaled so that attention is peaked: then the cosine says how much the form
changes what the blocks compute, and not which form is better for a trained model. The default is to be chosen with
weights.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

import saccade
from saccade.core.rotation import FORMS
from saccade.data import Loader, Preprocess, open_images

MODELS = ("vit_small_patch16_dinov3", "vit_small_patch16_rope_224", "vit_small_patch16_rope_mixed_224")
SETTINGS = ("tome(r=8)", "tome(r=13)", "evit(0.5)", "pitome()")


def inputs(model: saccade.AdaptiveViT, folder: str | None, count: int) -> torch.Tensor:
    """So many images of a folder, as the model takes them; None: noise with the spectrum of photos, 1 / f."""
    if folder is not None:
        loader = Loader(open_images(folder), Preprocess.of(model.vit))
        return torch.cat([batch.images for batch in loader.batches(count, range(count))])
    h, w = model.input_size()
    noise = torch.fft.rfft2(torch.randn(count, 3, h, w, generator=torch.Generator().manual_seed(0)))
    away = torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.rfftfreq(w)[None]).clamp(min=1 / h)
    images = torch.fft.irfft2(noise / away, s=(h, w))
    return (images - images.mean()) / images.std()


def sharpen(vit: torch.nn.Module) -> None:
    """Random weights under which attention looks somewhere: fresh ones attend evenly and add next to nothing."""
    for name, weight in vit.named_parameters():
        if weight.ndim == 2 and name.startswith("blocks."):
            torch.nn.init.normal_(weight, std=(2.0 if "attn.q" in name else 1.0) * weight.shape[1] ** -0.5)
        elif "gamma" in name:
            torch.nn.init.constant_(weight, 0.3)


def main() -> None:
    """Print a table of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=[*MODELS])
    parser.add_argument("--weights", help="a safetensors file with timm's keys, of one model; else random ones")
    parser.add_argument("--images", help="a folder; else noise")
    parser.add_argument("--count", type=int, default=16, help="images")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=0.0, help="of timing, for each model; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print("| model | setting | rotation | cosine to dense | of dense maps | speed-up |\n|---|---|---|---|---|---|")
    for name in asked.model:
        torch.manual_seed(0)
        model = saccade.create_model(name, weights=asked.weights, img_size=asked.size, num_classes=0)
        if asked.weights is None:
            sharpen(model.vit)
        images = inputs(model, asked.images, asked.count)
        settings = {f"grid(16, rotation='{form}') | {s}": (s, form) for s in SETTINGS for form in FORMS}
        timed = saccade.bench(model, [*settings], batch=[8], seconds=asked.seconds).rows if asked.seconds else []
        speed = {row.setting: f"{row.speedup:.2f}" for row in timed}
        with torch.inference_mode():
            dense, cells = model.embed(images), model.feature_map(images)
            for setting, (merging, form) in settings.items():
                view = model.at(setting).eval()
                near = F.cosine_similarity(view.embed(images), dense).mean()
                maps = F.cosine_similarity(view.feature_map(images), cells).mean()
                told = f"{near:.5f} | {maps:.5f} | {speed.get(str(view.setting), '')}"
                print(f"| {name} | `{merging}` | {form} | {told} |", flush=True)


if __name__ == "__main__":
    main()
