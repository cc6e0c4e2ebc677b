"""What patches of several sizes are worth: the claims of Quadformer, at the scale of one processor.

Paper     Quadformer, arXiv 2304.00287 (CVPRW 2023). Its orderings are tested, not its numbers: data and scale differ.
Claims    1. At as many tokens (and so, within 2 %, MACs) large and small patches beat a uniform grid; the paper says by
             0.79 points (ViT-B) and 0.88 (ViT-L), and by 0.42 at the same measured speed.
          2. Who says what is split matters: features > pixels > random, and an oracle that knows the label is above.
          3. One model for all numbers of tokens is within a point of one for each, and a mosaic falls less than a grid
             at a number that it was not trained for.
Method    ViT-Tiny/16, fine-tuned on Caltech-101 at 160 px (``studies/training.py`` makes it: START is its dense model),
          one more epoch under each setting: the same images, steps and rates for all. Test top-1 on 2,893 images with
          95 % intervals, differences paired over the images, means over seeds. On Imagenette: two runs from ImageNet.
          Photos have 160 px, so that a grid of 16 px patches is all of them: 64 tokens are a grid on 128 px, or a
          mosaic of 16 and 32 px patches on 160. Mosaics of 8, 16 and 32 px have the 100 tokens that this grid has.
          Scorers are compared in one model, which was trained with all of them in turn.
          The paper's feature network is a ShuffleNet with ImageNet weights; here it is the first blocks of a ViT-Tiny
          with ImageNet weights. The oracle is Grad-CAM of START, which sees the label.
Command   python studies/quadformer.py caltech160.zip START vit_tiny_patch16_224.safetensors \\
              --nette nette160.zip --out runs/quadformer [--seeds 0 1] [--epochs 5 --nette-epochs 3]
Cost      about an hour of one core; interrupted runs go on
Expected  1 holds at 49 and 64 tokens; 2 holds; 3 within a point.
Measured  docs/results-quadformer.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from jobs import TRAINED, Claim, Memory, labels, loader_of, logits, parser_of, right, table, train_all
from torch import Tensor

import saccade
from saccade.data import ImageSet, Preprocess, head_labels, open_images
from saccade.evaluation.stats import bootstrap
from saccade.storage.files import write_text
from saccade.tokenizers.scorers import given, register_scorer
from saccade.tokenizers.scorers.gradcam import class_maps
from saccade.tokenizers.scorers.networks import Network

GRIDS = {49: "grid(16, size=112)", 64: "grid(16, size=128)", 72: "grid(16, size=(128, 144))", 100: "grid(16)"}
ANY = (49, 55, 64, 76, 88)  # tokens that the single model is trained for
SEEDS = (0, 1, 2, 3)  # of random mosaics, which are the same for all images
BATCH = 50


def mosaic(tokens: int, scorer: str = "entropy", more: str = "") -> str:
    """A setting of ``tokens`` patches of 16 and 32 px on 160 px."""
    return f'quadtree({tokens}, sizes=(16, 32), scorer="{scorer}"{more})'


def three(tokens: int, fine: int, size: int, scorer: str = "pixel") -> str:
    """A setting of ``tokens`` patches of three sizes."""
    return f'quadtree({tokens}, sizes={(fine, 2 * fine, 4 * fine)}, size={size}, scorer="{scorer}")'


def feature(weights: str) -> str:
    """The paper's scorer with what is there for a network."""
    return f"feature('vit_tiny_patch16_224', stride=16, blocks=2, weights='{weights}')"


@register_scorer("centre")
def centre(backbone: object) -> Callable[[Tensor, int], Tensor]:
    """Blocks near the middle of the photo: a control that looks at nothing."""

    def scores(images: Tensor, size: int) -> Tensor:
        y, x = (torch.arange(side // size) + 0.5 - side / size / 2 for side in images.shape[-2:])
        near = -(y.abs().unsqueeze(1) + x.abs())
        return near.expand(len(images), -1, -1)

    return scores


@dataclass(frozen=True)
class Run:
    """A training: where it starts, what it learns under, how long."""

    data: str
    start: Sequence[str]
    settings: Sequence[str]
    epochs: float = 1
    seed: int = 0

    def arguments(self) -> list[str]:
        """Of ``saccade train``."""
        told = [
            f"sampling.settings={json.dumps(list(self.settings))}",
            f"run.epochs={self.epochs}",
            f"run.seed={self.seed}",
        ]
        return ["finetune", f"data.path={self.data}", *self.start, *TRAINED, "run.save_every=100", *told]


def runs_of(
    data: str, start: str, weights: str, nette: str | None, seeds: Sequence[int], epochs: tuple[float, float]
) -> dict[str, Run]:
    """Every training of the study by its name, in the order in which they matter; epochs: of Caltech, of Imagenette."""
    scorers = ["pixel", "entropy", "attention(6)", feature(weights), *(f"random({seed})" for seed in SEEDS)]
    healed = {
        "uniform-64": [GRIDS[64]],
        "entropy-64": [mosaic(64)],
        "pixel-64": [mosaic(64, "pixel")],
        "scorers-64": [mosaic(64, scorer) for scorer in scorers],
        "uniform-49": [GRIDS[49]],
        "entropy-49": [mosaic(49)],
        "single": [mosaic(tokens) for tokens in ANY],
        "uniform-72": [GRIDS[72]],
        "uniform-100": [GRIDS[100]],
        "fine-100": [three(100, 8, 160)],
        "large-100": [three(100, 16, 320)],
        "large-64": [three(64, 16, 320, "entropy")],
        "detail-64": [mosaic(64, more=", detail=True, size_embedding=True")],
    }
    twice = ("uniform-64", "entropy-64")
    begin = [f"model.name={start}"]
    runs = {f"{name}-{seeds[0]}": Run(data, begin, settings, epochs[0], seeds[0]) for name, settings in healed.items()}
    if nette is not None:
        source = [f"model.weights={weights}", "model.size=160", "model.crop_pct=1.0"]
        for name in twice:
            runs[f"nette-{name}-{seeds[0]}"] = Run(nette, source, healed[name], epochs[1], seeds[0])
    for seed in seeds[1:]:
        runs |= {f"{name}-{seed}": Run(data, begin, healed[name], epochs[0], seed) for name in twice}
    return runs


@dataclass
class Tests:
    """Hits of finished runs on the test images, each computed once and kept."""

    out: Path
    images: ImageSet
    seeds: Sequence[int]
    start: str
    maps: Tensor | None = None

    def __post_init__(self) -> None:
        self.seen = Memory(self.out / f"hits-{self.images.path.stem}.safetensors")

    def there(self, run: str) -> list[int]:
        """Seeds of a run that are finished."""
        return [seed for seed in self.seeds if (self.out / f"{run}-{seed}" / "model").is_dir()]

    def hits(self, run: str, *settings: str, seeds: Sequence[int] | None = None) -> Tensor:
        """Whether each test image is classified rightly [n] float64, mean over seeds and settings."""
        where = [f"{run}-{seed}" for seed in (self.there(run) if seeds is None else seeds)]
        return torch.stack([self._hits(name, setting) for name in where for setting in settings]).mean(0)

    def _hits(self, run: str, setting: str) -> Tensor:
        def make() -> Tensor:
            model, n, found = saccade.load(self.out / run / "model"), len(self.images), []
            for first in range(0, n, BATCH):
                part = range(first, min(n, first + BATCH))
                known = given(maps=self.oracle()[first : part.stop]) if "maps" in setting else nullcontext()
                with known:
                    found.append(logits(model, setting, self.images, part))
            return right(torch.cat(found), labels(model, self.images))

        return self.seen(f"{run}|{setting}", make)

    def oracle(self) -> Tensor:
        """Where the start, told the label, sees it, [n, 10, 10]."""
        if self.maps is None:
            vit = saccade.load(self.start).eval().vit
            net, found = Network("start", None, "", None, vit), list[Tensor]()
            classes = torch.tensor(head_labels(self.images, vit).indices)
            std, mean = (torch.tensor(v)[:, None, None] for v in (net.std, net.mean))
            for seen in loader_of(self.images, Preprocess.of(vit)).batches(BATCH, range(len(self.images))):
                at = seen.images.shape[0] * len(found)
                pixels = seen.images * std + mean
                layer = f"blocks.{len(vit.blocks) - 1}.norm1"
                found.append(class_maps(net, pixels, classes[at : at + len(pixels)], layer))
            self.maps = torch.cat(found)
        return self.maps


Side = tuple[str, tuple[str, ...]]  # a run, and the settings that it is tested under


def chosen(tests: Tests, sides: Sequence[Side]) -> Tensor:
    """Hits [n] of the side that is best on the other half of the images: none chooses for itself."""
    found = torch.stack([tests.hits(run, *settings) for run, settings in sides])
    even = torch.arange(found.shape[1]) % 2 == 0
    best = [int(found[:, half].mean(1).argmax()) for half in (even, ~even)]
    print(f"chosen on the even and on the odd images: {[sides[i] for i in best]}")
    return torch.where(even, found[best[1]], found[best[0]])


def claims_of(tests: Tests, weights: str) -> list[Claim]:
    """The paper's orderings, each as a paired difference over the test images."""
    found = []

    def claim(text: str, better: Side, worse: Side, slack: float = 0.0) -> None:
        def difference() -> Tensor:
            both = [seed for seed in tests.there(better[0]) if seed in tests.there(worse[0])]
            return tests.hits(better[0], *better[1], seeds=both) - tests.hits(worse[0], *worse[1], seeds=both)

        found.append(Claim(text, (better[0], worse[0]), difference, slack))

    def one(run: str, *settings: str) -> Side:
        return run, settings

    for tokens in (49, 64):
        uniform = one(f"uniform-{tokens}", GRIDS[tokens])
        claim(f"{tokens} tokens: 16/32 px by entropy > uniform", one(f"entropy-{tokens}", mosaic(tokens)), uniform)
    looks = ("pixel", "entropy", "attention(6)", feature(weights))
    for tokens, against in ((49, "uniform-49"), (64, "uniform-64"), (64, "uniform-72")):
        sides = [one(f"entropy-{tokens}", mosaic(tokens)), *(one("scorers-64", mosaic(tokens, look)) for look in looks)]
        if tokens == 64:
            sides += [one("pixel-64", mosaic(64, "pixel")), one("large-64", three(64, 16, 320, "entropy"))]
        sides = [side for side in sides if tests.there(side[0])]

        def margin(sides: Sequence[Side] = sides, against: str = against) -> Tensor:
            return chosen(tests, sides) - tests.hits(against, GRIDS[int(against[-2:])])

        text = f"{tokens} tokens, scorer and sizes chosen on the other half of the images > {against[-2:]} uniform"
        found.append(Claim(text, (f"entropy-{tokens}", against), margin))
    ours, pixel = one("entropy-64", mosaic(64)), one("pixel-64", mosaic(64, "pixel"))
    claim("64 tokens: 16/32 px by pixels > uniform", pixel, one("uniform-64", GRIDS[64]))
    claim("64 tokens by entropy > 72 uniform, which take longer", ours, one("uniform-72", GRIDS[72]))
    claim("64 tokens by entropy within 1 point of 100", ours, one("uniform-100", GRIDS[100]), 0.01)
    for name, setting in (("fine", three(100, 8, 160)), ("large", three(100, 16, 320))):
        claim(f"100 tokens: `{setting}` > uniform", one(f"{name}-100", setting), one("uniform-100", GRIDS[100]))
    claim(
        "64 tokens: detail branch and size embedding > none",
        one("detail-64", mosaic(64, more=", detail=True, size_embedding=True")),
        ours,
    )

    def by(*scorers: str) -> Side:
        return one("scorers-64", *(mosaic(64, scorer) for scorer in scorers))

    at_random, features = by(*(f"random({seed})" for seed in SEEDS)), by(feature(weights))
    for scorer in ("pixel", "entropy", "attention(6)"):
        claim(f"one model, 64 tokens: {scorer} > random", by(scorer), at_random)
    claim("one model, 64 tokens: features (ViT, 2 blocks) > random", features, at_random)
    claim("one model, 64 tokens: features (ViT, 2 blocks) > pixel", features, by("pixel"))
    for scorer in ("pixel", "entropy", "attention(6)"):
        claim(f"one model, 64 tokens: oracle > {scorer}", by("maps"), by(scorer))
    claim("one model, 64 tokens: entropy > the middle of the photo", by("entropy"), by("centre"))
    for tokens in (49, 64):
        alone = one(f"entropy-{tokens}", mosaic(tokens))
        claim(f"{tokens} tokens: one model for all numbers within 1 point", one("single", mosaic(tokens)), alone, 0.01)
    for tokens in (49, 100):

        def kept(tokens: int = tokens) -> Tensor:
            there = mosaic(tokens) if tokens < 100 else GRIDS[100]
            mosaics = tests.hits("entropy-64", there) - tests.hits("entropy-64", mosaic(64))
            return mosaics - (tests.hits("uniform-64", GRIDS[tokens]) - tests.hits("uniform-64", GRIDS[64]))

        text = f"trained at 64 tokens, a mosaic {'loses less' if tokens < 64 else 'gains more'} than a grid at {tokens}"
        found.append(Claim(text, ("entropy-64", "uniform-64"), kept))
    return found


def shown(tests: Tests, runs: dict[str, Run]) -> list[str]:
    """A row for each run under the settings that it was trained for, and a few more."""
    lines = ["| trained | setting | test top-1 |", "|---|---|---|"]
    for run in dict.fromkeys(name.rsplit("-", 1)[0] for name in runs):
        if not tests.there(run):
            continue
        settings = list(runs[f"{run}-{tests.there(run)[0]}"].settings)
        if run == "scorers-64":
            settings += [mosaic(64, "centre"), mosaic(64, "maps")]
        for setting in settings:
            mean, low, high = (100 * v for v in bootstrap(tests.hits(run, setting)).three())
            text = re.sub(r", weights='.*?'", "", setting).replace("maps", "Grad-CAM of the label")
            lines.append(f"| {run} ({len(tests.there(run))}) | `{text}` | {mean:.1f} % [{low:.1f}, {high:.1f}] |")
    return lines


def main() -> None:
    """Train what is not trained yet, test, and write the tables."""
    parser = parser_of(__doc__, "runs/quadformer", "data")
    parser.add_argument("start", help="folder of a model fine-tuned on the data")
    parser.add_argument("weights")
    parser.add_argument("--nette")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--epochs", type=float, default=1, help="of each run; other lengths go to another folder")
    parser.add_argument("--nette-epochs", type=float, default=0.5, help="of each run on Imagenette")
    parser.add_argument("--runs", nargs="+", help="train only these")
    parser.add_argument("--report", action="store_true", help="only from the runs that are finished")
    given_ = parser.parse_args()
    lengths = given_.epochs, given_.nette_epochs
    runs = runs_of(given_.data, given_.start, given_.weights, given_.nette, given_.seeds, lengths)
    if not given_.report:
        chosen = {name: run.arguments() for name, run in runs.items() if given_.runs is None or name in given_.runs}
        train_all(chosen, given_.out, given_.at_once)
    tests = Tests(given_.out, open_images(given_.data, "test"), given_.seeds, given_.start)
    here = {name: run for name, run in runs.items() if not name.startswith("nette")}
    head = ["claim", "points", "verdict"]
    claims = [claim.row(tests.there) for claim in claims_of(tests, given_.weights)]
    lines = ["Caltech-101", "", *shown(tests, here), "", table(head, claims)]
    if given_.nette is not None:
        other = Tests(given_.out, open_images(given_.nette, "val"), given_.seeds, given_.start)
        lines += ["", "Imagenette", "", *shown(other, {n: r for n, r in runs.items() if n.startswith("nette")})]
        sides = ("nette-entropy-64", (mosaic(64),)), ("nette-uniform-64", (GRIDS[64],))
        claim = Claim(
            "64 tokens: 16/32 px by entropy > uniform",
            (sides[0][0], sides[1][0]),
            lambda: other.hits(sides[0][0], *sides[0][1]) - other.hits(sides[1][0], *sides[1][1]),
        )
        lines += ["", table(head, [claim.row(other.there)])]
    write_text(given_.out / "quadformer.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
