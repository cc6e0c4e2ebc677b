"""Does a text tower that was tuned against an image tower at random patch sizes serve every patch size?

Claim     FlexiViT (arXiv 2212.08013) §5.2: FlexiLiT, a flexible image tower tuned at random patch sizes, is flat across
          them; LiT, an ordinary tower tuned at one, degrades away from it.
Method    ViT-Tiny, locked, at 160 px: AugReg's own (ordinary), and that made flexible without labels on other photos
          (runs/flexivit/pretrained of studies/flexivit.py). A byte-level text tower of 0.3 M parameters is tuned on
          Caltech-101's training images by the sigmoid loss. The texts are *made*: "a photo of a {class}.", one for each
          class: no natural captions are tested here, and no class is new at the test. Images are seen at patch 16
          always, or at a random one of 10, 16, 20 and 32 each step; and, as the best to be hoped for, there is a text
          tower for each size of the ordinary one. The same images and steps for all. Zero-shot accuracy on the test
          images, with the same prompt; intervals at 95 %, paired over the images where differences are meant.
Command   python studies/textimage.py caltech160.zip vit_tiny_patch16_224.safetensors runs/flexivit/pretrained/model
          --out runs/textimage
Cost      about half an hour of one core, most of it the locked towers' features, made once for each tower and size
Measured  docs/results.md, "Text and image"
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from jobs import loader_of, parser_of, table, write
from safetensors.torch import load_file
from torch import Tensor

import saccade
from saccade.data import ImageSet, Preprocess, open_images
from saccade.evaluation.stats import Interval, bootstrap, proportion
from saccade.storage.files import write_json
from saccade.tasks.image_text.image_text_data import captioned
from saccade.tasks.image_text.image_text_task import shared
from saccade.tasks.image_text.text_tower import TextTower
from saccade.tasks.image_text.two_tower import Space
from saccade.terminal.progress import Progress
from saccade.training.config import Optim
from saccade.training.optimizer import rate

PATCHES = (10, 16, 20, 32)
FIXED = 16
SIZE = 160
TEMPLATE = "a photo of a {}."
WAYS = {  # text towers: tuned against which image tower, at which of its patch sizes
    "LiT": ("ordinary", (FIXED,)),
    "LiT, random sizes": ("ordinary", PATCHES),
    "FlexiLiT": ("flexible", PATCHES),
    **{f"own {p}": ("ordinary", (p,)) for p in PATCHES if p != FIXED},
}


def main() -> None:
    parser = parser_of(__doc__, "runs/textimage", "data")
    parser.add_argument("weights", help="of the ordinary tower")
    parser.add_argument("flexible", help="folder of the same tower, made flexible")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, help="of training and of test images, to try it out")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    sets = {split: open_images(arguments.data, split) for split in ("train", "test")}
    if arguments.limit:
        sets = {k: s.subset(range(0, len(s), max(1, len(s) // arguments.limit))) for k, s in sets.items()}
    towers = {"ordinary": arguments.weights, "flexible": arguments.flexible}
    with Progress(shown=True) as progress:
        seen = {
            (tower, split, patch): features(images, tower, towers[tower], patch, out, progress)
            for tower in towers
            for split, images in sets.items()
            for patch in PATCHES
        }
        train, test = captioned(sets["train"], (TEMPLATE,)), sets["test"]
        assert test.labels is not None and test.classes is not None
        labels, prompts = torch.tensor(test.labels), [t for (t,) in dict.fromkeys(captioned(test, (TEMPLATE,)).texts)]
        texts = [t for (t,) in train.texts]
        hits: dict[tuple[str, int, int], Tensor] = {}
        for seed in arguments.seeds:
            for way, (tower, patches) in WAYS.items():
                file = out / f"{way.replace(' ', '-')}-{seed}-{arguments.steps}-{len(texts)}.safetensors"
                if not file.exists():
                    views = [seen[tower, "train", p] for p in patches]
                    space = tune(views, texts, arguments.steps, arguments.batch, seed, way, progress)
                    write(space.state_dict(), file)
                space = new_space(seed)
                space.load_state_dict(load_file(file))
                with torch.no_grad():
                    words = space.eval().words(prompts)
                    for p in patches if way.startswith("own") else PATCHES:
                        best = (space.images(seen[tower, "test", p]) @ words.T).argmax(1)
                        hits[way, p, seed] = (best == labels).double()
    show(hits, arguments.seeds, out)


def features(images: ImageSet, tower: str, source: str, patch: int, out: Path, progress: Progress) -> Tensor:
    """Pooled features of a locked tower at a patch size, [n, D]; made once."""
    file = out / f"features-{tower}-{images.split}-{patch}-{len(images)}.safetensors"
    if file.exists():
        return load_file(file)["features"]
    setting = f"grid({patch}, size={SIZE})"
    if os.path.isdir(source):
        vit = saccade.load(source, "dense").vit
    else:
        vit = saccade.create_model("vit_tiny_patch16_224", weights=source).vit
    vit.reset_classifier(0)
    model = saccade.AdaptiveViT(vit, setting).eval()
    preprocess = Preprocess.of(vit, SIZE)
    preprocess = Preprocess.from_dict({**preprocess.to_dict(), "crop_pct": 1.0})  # the photos are squares of that size
    bar = progress.start(f"{tower}, {setting} on {images.split}", len(images))
    parts = []
    for batch in loader_of(images, preprocess).batches(32):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            parts.append(model(batch.images).logits.float())
        bar(len(batch.indices))
    bar.finish()
    found = torch.cat(parts)
    assert len(found) == len(images)
    write({"features": found}, file)
    return found


def new_space(seed: int) -> Space:
    """A fresh text tower, whose outputs stand beside the image tower's own features."""
    torch.manual_seed(seed)
    return Space(TextTower(192, width=96, depth=2, length=48), 192, project=False, loss="sigmoid")


def tune(
    views: list[Tensor], texts: list[str], steps: int, batch: int, seed: int, way: str, progress: Progress
) -> Space:
    """Tune a text tower against features of locked images, at one of ``views`` each step: FlexiLiT without pixels."""
    space, rule = new_space(seed).train(), Optim(lr=1e-3, warmup=0.1)
    optimizer = torch.optim.AdamW(space.parameters(), weight_decay=rule.weight_decay)
    order = torch.Generator().manual_seed(seed)
    bar = progress.start(f"text tower, {way}, seed {seed}", steps)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate(step, steps, rule)
        rows = torch.randint(len(texts), (batch,), generator=order)
        which = int(torch.randint(10_000, (), generator=order)) % len(views)
        chosen = [texts[i] for i in rows.tolist()]
        # a text is run once, however many images have it
        different = list(dict.fromkeys(chosen))
        words = space.words(different)[[different.index(text) for text in chosen]]
        same = shared([(text,) for text in chosen], chosen)
        loss = space.compare(space.images(views[which][rows]), words, same) / batch
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(space.parameters(), rule.clip)
        optimizer.step()
        bar(1, what=f"text tower, {way}, seed {seed}, loss {loss.item():.3f}")
    bar.finish()
    return space


def show(hits: dict[tuple[str, int, int], Tensor], seeds: list[int], out: Path) -> None:
    """The table, also as JSON."""
    rows = []
    for p in PATCHES:
        of = {way: torch.stack([hits[way, p, s] for s in seeds]) for way in WAYS if (way, p, seeds[0]) in hits}
        own = of.pop(f"own {p}", of["LiT"])
        accuracy = {way: proportion(found.flatten().bool()) for way, found in {**of, "own size": own}.items()}
        paired = {
            "FlexiLiT - LiT": bootstrap((of["FlexiLiT"] - of["LiT"]).mean(0)),
            "FlexiLiT - own": bootstrap((of["FlexiLiT"] - own).mean(0)),
        }
        rows.append((p, accuracy | paired))
    cells = [[str(p), *(_cell(name, value) for name, value in found.items())] for p, found in rows]
    print(table(["patch", *rows[0][1]], cells))
    told = [{"patch": p, **{name: vars(value) for name, value in found.items()}} for p, found in rows]
    write_json(out / "textimage.json", told)


def _cell(name: str, value: Interval) -> str:
    sign, unit = ("+", "") if " - " in name else ("", " %")
    mean, low, high = (f"{100 * v:{sign}.1f}" for v in value.three())
    return f"{mean}{unit} [{low}, {high}]"


if __name__ == "__main__":
    main()
