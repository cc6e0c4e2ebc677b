"""Which setting runs in which engine, and how far its answers are from PyTorch's: docs/engines.md.

    python benchmarks/engines.py [--engines onnx openvino aoti] [--settings …] [--out docs/engines.md]
    python benchmarks/engines.py --photos inval227_dev.zip --weights vit_tiny_patch16_224.safetensors

Every registered method and tokenizer, at a setting that does something, on ViT-Tiny of ``--depth`` blocks with random
weights. A cell is the largest difference of any logit over the largest one, on noise, for batches of 1 and 8 images of
a program that was exported for any batch; then of one exported for a batch of 8. "–" and a number lead to the reason.
What was measured goes to a file beside the page, so that a run that is interrupted, or of other engines, adds to it.

With photos and weights instead: ``saccade export`` of six settings of the whole ViT-Tiny, and its parity report.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import saccade
from saccade.core.registry import registry
from saccade.errors import UserError
from saccade.evaluation.export import export
from saccade.runners.engine import engine_of, versions
from saccade.runners.runner import NOUNS, QUANTISED

SETTINGS = {  # where a bare name does nothing, or not enough
    "dense": "dense",
    "grid": "grid(32)",
    "quadtree": "quadtree(97)",
    "random_plus": "random_plus(0.7)",
    "together": "imagepiece() | evit(0.8)",
}

ON_PHOTOS = ("dense", "evit(0.7)", "topk(0.5)", "tome(r=13)", "imagepiece() | evit(0.8)", "quadtree(121)")
PHOTOS = "photos"  # key of their rows


def settings() -> Iterator[str]:
    """One for each registered name, and a composition."""
    yield SETTINGS["dense"]
    for name in registry():
        yield SETTINGS.get(name, f"{name}()")
    yield SETTINGS["together"]


@torch.no_grad()
def measured(setting: str, engine: str, dtype: str, depth: int) -> str:
    """Differences at batch 1 and 8 of a free batch, and of a fixed one; or why there are none."""
    try:
        model = saccade.create_model("vit_tiny_patch16_224", setting, depth=depth)
        images = torch.randn(8, 3, *model.input_size(), generator=torch.Generator().manual_seed(0))
        expected = model(images).logits
        free = model.runner(engine, dtype=dtype)
        fixed = model.runner(engine, dtype=dtype, batch=8)
        found = [free(images[:1]), free(images), fixed(images)]
    except UserError as error:
        return f"no: {error}"
    except Exception as error:
        return f"no: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    scale = expected.abs().max()
    return " / ".join(f"{((f - expected[: len(f)]).abs().max() / scale).item():.0e}" for f in found)


def on_photos(runner: str, photos: str, weights: str) -> dict[str, str]:
    """Rows of the parity report of six settings, by setting."""
    with TemporaryDirectory() as folder:
        made = export("vit_tiny_patch16_224", f"{folder}/out", runner=runner, settings=ON_PHOTOS, data=photos,
                      weights=weights, least=0.0)  # fmt: skip
    return {
        row.setting: f"{row.agreement:.2%}, {row.largest:.0e}, {row.top1:.1%} ({row.top1_before:.1%})"
        for row in made.rows
    }


def page(known: dict[str, dict[str, str]], facts: str) -> str:
    """The table in Markdown, and the reasons below it."""
    known = dict(known)
    photos = known.pop(PHOTOS, {})
    ways = list(dict.fromkeys(way for row in known.values() for way in row))
    reasons: list[str] = []
    lines = ["# Engines", "", "Made by `python benchmarks/engines.py`; " + facts, ""]
    lines += [(__doc__ or "").split("\n\n")[2].replace("\n", " "), ""]
    lines += ["| setting | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for setting, row in known.items():
        cells = []
        for way in ways:
            text = row.get(way, "")
            if text.startswith("no: "):
                if text[4:] not in reasons:
                    reasons.append(text[4:])
                text = f"– ({reasons.index(text[4:]) + 1})"
            cells.append(text)
        name = setting.replace("|", "\\|")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += ["", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))]
    if photos:
        lines += ["", "## On photos", ""]
        lines += [
            "ViT-Tiny with its ImageNet weights on 300 photos of the validation set, programs for any batch: share with"
        ]
        lines += ["PyTorch's best class, largest difference of a logit over the largest one, top-1 (PyTorch's).", ""]
        lines += ["| setting | " + " | ".join(photos) + " |", "|---" * (len(photos) + 1) + "|"]
        lines += [
            f"| `{setting.replace('|', chr(92) + '|')}` | "
            + " | ".join(rows[setting] for rows in photos.values())
            + " |"
            for setting in ON_PHOTOS
        ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Measure what is not known yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["onnx", "openvino", "aoti"])
    parser.add_argument("--settings", nargs="+", default=list(settings()))
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--photos")
    parser.add_argument("--weights")
    parser.add_argument("--out", type=Path, default=Path("docs/engines.md"))
    arguments = parser.parse_args()
    file = arguments.out.with_suffix(".json")
    known: dict[str, dict[str, str]] = json.loads(file.read_text()) if file.exists() else {}
    said = [f"Python {platform.python_version()}"]
    for name in arguments.engines:
        engine = engine_of(name)
        said += [f"{package} {version.split('+')[0]}" for package, version in versions(engine).items()]
        if arguments.photos:
            for dtype in engine.dtypes():
                rows = on_photos(f"{name} {dtype}", arguments.photos, arguments.weights)
                known.setdefault(PHOTOS, {})[f"{NOUNS[name]} {dtype}"] = rows  # type: ignore[assignment]
                file.write_text(json.dumps(known, indent=1))
            continue
        for setting in arguments.settings:
            for dtype in engine.dtypes():
                way, row = f"{NOUNS[name]} {dtype}", known.setdefault(setting, {})
                if dtype != QUANTISED and way not in row:
                    row[way] = measured(setting, name, dtype, arguments.depth)
                    print(f"{setting}, {way}: {row[way]}", flush=True)
                    file.write_text(json.dumps(known, indent=1))
    arguments.out.write_text(page(known, ", ".join(dict.fromkeys(said)) + "."), encoding="utf-8")


if __name__ == "__main__":
    main()
