"""Patches of several sizes without any training: how far do pretrained weights carry, and whose mosaic is best?

Paper     Quadformer, arXiv 2304.00287, trains; here every setting runs the weights as they are.
Claims    1. More tokens are nearer to the whole grid. 2. Mosaics that look at the photo beat random ones, and
          the uniform grid of as many tokens, a smaller photo.
Method    ViT-Tiny/16 (AugReg) on ImageNet validation photos and on Imagenette, at 224 px with patches of 16 and 32 px
          and at 256 px with 16, 32 and 64. Top-1, and agreement with the whole grid of the same input; differences to
          the uniform grid and to random mosaics (means of four) are paired over the photos, with 95 % intervals.
          The paper's feature network is a ShuffleNet with ImageNet weights; here, the first blocks of the same ViT.
Command   python studies/mosaics.py vit_tiny_patch16_224.safetensors inval227_dev.zip nette160.zip [--limit 500]
Cost      about 10 minutes of one core
Expected  both hold from 100 tokens on.
Measured  docs/results-quadformer.md
"""

from __future__ import annotations

from pathlib import Path

import torch
from jobs import labels, logits, parser_of, points
from torch import Tensor

import saccade
from saccade.data import ImageSet, open_images
from saccade.evaluation.accuracy import spread
from saccade.evaluation.stats import bootstrap
from saccade.model import AdaptiveViT
from saccade.storage.files import write_text

INPUTS = {224: (16, 32), 256: (16, 32, 64)}
TOKENS = {64: 128, 100: 160, 169: 208}  # and the pixels of the photo that has as many in a uniform grid
RANDOM = tuple(f"random({seed})" for seed in range(4))


class Looks:
    """Classes that settings give to the photos of one set."""

    def __init__(self, model: AdaptiveViT, images: ImageSet, limit: int) -> None:
        self.model, self.images = model, images
        self.places = spread(len(images), limit)
        self.labels = labels(model, images, self.places)

    def best(self, setting: str) -> Tensor:
        """[n] int64."""
        return logits(self.model, setting, self.images, self.places).argmax(-1)


def rows(looks: Looks, scorers: dict[str, tuple[str, ...]]) -> list[str]:
    """The table of one set of photos."""
    lines = [
        "| input | tokens | mosaic by | top-1 | − uniform | − random | agreement | − uniform | − random |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size, sizes in INPUTS.items():
        dense = looks.best(f"grid(16, size={size})")
        hits = (dense == looks.labels).double()
        lines.append(f"| {size} | {(size // 16) ** 2} | all fine | {100 * float(hits.mean()):.1f} % | | | | | |")
        for tokens, side in TOKENS.items():
            settings: dict[str, tuple[str, ...]] = {"uniform": (f"grid(16, size={side})",)}
            for name, calls in scorers.items():
                settings[name] = tuple(
                    f'quadtree({tokens}, sizes={sizes}, size={size}, scorer="{call}")' for call in calls
                )
            found = {name: [looks.best(s) for s in several] for name, several in settings.items()}
            right = {name: _mean([b == looks.labels for b in several]) for name, several in found.items()}
            agree = {name: _mean([b == dense for b in several]) for name, several in found.items()}
            for name in settings:
                cells = [f"{size}", f"{tokens}", name]
                for values in (right, agree):
                    cells.append(f"{100 * float(values[name].mean()):.1f} %")
                    for rival in ("uniform", "random"):
                        cells.append("" if name == rival else points(bootstrap(values[name] - values[rival])))
                lines.append("| " + " | ".join(cells) + " |")
                print(lines[-1], flush=True)
    return lines


def _mean(several: list[Tensor]) -> Tensor:
    return torch.stack([one.double() for one in several]).mean(0)


def main() -> None:
    """Look at everything and write the tables."""
    parser = parser_of(__doc__, "runs/mosaics.md", "weights")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--limit", type=int, default=500, help="most photos of a set, evenly spread")
    arguments = parser.parse_args()
    model = saccade.create_model("vit_tiny_patch16_224", weights=arguments.weights)
    look = f"feature('vit_tiny_patch16_224', stride=16, blocks=2, weights='{arguments.weights}')"
    scorers = {"random": RANDOM, "pixel": ("pixel",), "entropy": ("entropy",)}
    scorers |= {"first look": ("attention(6)",), "features": (look,)}
    lines = []
    for data in arguments.data:
        looks = Looks(model, open_images(data), arguments.limit)
        lines += [f"{Path(data).stem}, {len(looks.places)} photos", "", *rows(looks, scorers), ""]
    write_text(arguments.out, "\n".join(lines))


if __name__ == "__main__":
    main()
