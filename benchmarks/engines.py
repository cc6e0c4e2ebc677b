"""Which setting runs in which engine, and how far its answers are from PyTorch's: docs/engines.md.

    python benchmarks/engines.py [--engines onnx openvino aoti] [--settings …] [--again] [--out docs/engines.md]
    python benchmarks/engines.py --photos inval227_dev.zip --weights vit_tiny_patch16_224.safetensors

Every registered method and tokenizer, at a setting that does something, on ViT-Tiny of three blocks (``--depth``) with
random weights, on noise. A cell is for batches of 1 and 8 images of a program that was exported for any batch; then
for one exported for a batch of 8. In fp32 it is the largest difference of any logit from PyTorch's, over the largest
one. In bf16, where near ties are decided otherwise, it is the length of the logits' difference from PyTorch's in fp32
over their length, and in brackets the same of PyTorch's own bf16: an engine that rounds no worse is as far away. "–"
and a number lead to the reason why there is none, of which openvinotoolkit/openvino#24072 says more; ONNX Runtime has
no matrix product in bf16 on a processor (microsoft/onnxruntime#20630). An empty cell was not measured yet.

The page is its own record: what it holds is kept, so that a run that is interrupted, or of other engines, adds to it.
With photos and weights instead: ``saccade export`` of six settings of the whole ViT-Tiny, and its parity report.
"""

from __future__ import annotations

import argparse
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

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
PHOTOS = "## On photos"
PHOTOS_ARE = """ViT-Tiny with its ImageNet weights on 300 photos of the validation set, programs for any batch: share
with PyTorch's best class, largest difference of a logit over the largest one, top-1 (PyTorch's)."""

Table = dict[str, dict[str, str]]  # setting -> way to run -> cell; a cell that begins with "no: " is a reason


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
        torch.manual_seed(0)  # of the weights
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
    if dtype == "fp32":
        return " / ".join(f"{largest(f, expected):.0e}" for f in found)
    own = model.deploy(dtype)(images).logits
    return " / ".join(f"{away(f, expected):.0e}" for f in found) + f" ({away(own, expected):.0e})"


def largest(found: Tensor, expected: Tensor) -> float:
    """Difference of any logit, over the largest logit of all."""
    return ((found - expected[: len(found)]).abs().max() / expected.abs().max()).item()


def away(found: Tensor, expected: Tensor) -> float:
    """Length of the difference, over that of what is expected."""
    expected = expected[: len(found)]
    return ((found - expected).norm() / expected.norm()).item()


def on_photos(runner: str, photos: str, weights: str) -> dict[str, str]:
    """Rows of the parity report of six settings, by setting."""
    with TemporaryDirectory() as folder:
        made = export("vit_tiny_patch16_224", f"{folder}/out", runner=runner, settings=ON_PHOTOS, data=photos,
                      weights=weights, least=0.0)  # fmt: skip
    return {
        row.setting: f"{row.agreement:.2%}, {row.largest:.0e}, {row.top1:.1%} ({row.top1_before:.1%})"
        for row in made.rows
    }


def recorded(text: str) -> tuple[Table, Table, str]:
    """What a page holds: both tables, and the words behind the one of photos."""
    above, _, below = text.partition(PHOTOS)
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", above, re.MULTILINE))
    return rows_of(above, reasons), rows_of(below, {}), below.rpartition("|\n")[2].strip()


def rows_of(text: str, reasons: dict[str, str]) -> Table:
    """A table in Markdown."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    (_, *ways), *rows = [[cell.strip() for cell in line] for line in lines] or [[""]]
    found: Table = {}
    for name, *cells in rows:
        known = {way: cell for way, cell in zip(ways, cells, strict=True) if cell}
        marks = {way: re.fullmatch(r"– \((\d+)\)", cell) for way, cell in known.items()}
        row = {way: f"no: {reasons[mark[1]]}" if (mark := marks[way]) else cell for way, cell in known.items()}
        found[name.strip("`").replace("\\|", "|")] = row
    return found


def table(known: Table, reasons: list[str]) -> list[str]:
    """A table in Markdown; a reason is added to those that are known, and stands as its number."""
    ways = sorted({way for row in known.values() for way in row}, key=order)
    lines = ["| setting | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for setting, row in known.items():
        cells = [row.get(way, "") for way in ways]
        for reason in (cell[4:] for cell in cells if cell.startswith("no: ")):
            reasons += [] if reason in reasons else [reason]
        cells = [f"– ({reasons.index(cell[4:]) + 1})" if cell.startswith("no: ") else cell for cell in cells]
        name = setting.replace("|", "\\|")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def order(way: str) -> tuple[int, str]:
    """ONNX Runtime, OpenVINO, AOTInductor; fp32 before bf16."""
    nouns, dtype = list(NOUNS.values()), way.rsplit(" ", 1)[1]
    places = [n for n in ("onnx", "openvino", "aoti") if way.startswith(NOUNS[n])]
    return (["onnx", "openvino", "aoti"].index(places[0]) if places else len(nouns)), "" if dtype == "fp32" else dtype


def page(known: Table, photos: Table, rest: str, facts: str) -> str:
    """The whole of it in Markdown."""
    reasons: list[str] = []
    words = (__doc__ or "").split("\n\n")[2].replace("\n", " ").replace("``", "`")
    lines = ["# Engines", "", f"Made by `python benchmarks/engines.py`; {facts}", "", words, "", *table(known, reasons)]
    lines += ["", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))] if reasons else []
    if photos:
        lines += ["", PHOTOS, "", PHOTOS_ARE, "", *table(photos, []), "", rest]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Measure what is not known yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["onnx", "openvino", "aoti"])
    parser.add_argument("--settings", nargs="+", default=list(settings()))
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--photos")
    parser.add_argument("--weights")
    parser.add_argument("--again", action="store_true", help="Measure what the page has, too.")
    parser.add_argument("--out", type=Path, default=Path("docs/engines.md"))
    arguments = parser.parse_args()
    known, photos, rest = recorded(arguments.out.read_text(encoding="utf-8") if arguments.out.exists() else "")
    said = [f"Python {platform.python_version()}"]
    for name in ("onnx", "openvino", "aoti"):
        said += [f"{package} {version.split('+')[0]}" for package, version in versions(engine_of(name)).items()]
    facts = ", ".join(dict.fromkeys(said)) + "."
    for name in arguments.engines:
        for dtype in (dtype for dtype in engine_of(name).dtypes() if dtype != QUANTISED):
            way = f"{NOUNS[name]} {dtype}"
            for setting in () if arguments.photos else arguments.settings:
                row = known.setdefault(setting, {})
                if arguments.again or way not in row:
                    row[way] = measured(setting, name, dtype, arguments.depth)
                    print(f"{setting}, {way}: {row[way]}", flush=True)
                    arguments.out.write_text(page(known, photos, rest, facts), encoding="utf-8")
            if arguments.photos:
                for setting, cell in on_photos(f"{name} {dtype}", arguments.photos, arguments.weights).items():
                    photos.setdefault(setting, {})[way] = cell
    arguments.out.write_text(page(known, photos, rest, facts), encoding="utf-8")


if __name__ == "__main__":
    main()
