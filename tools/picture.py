"""The pictures of the documentation, made anew.

What three settings look at, on one photo:

    python tools/picture.py settings vit_tiny_patch16_224 --weights vit_tiny_patch16_224.safetensors

What each method leaves of the same photo, where nothing has to be learned first, into docs/pictures/methods/:

    python tools/picture.py methods vit_tiny_patch16_224 --weights vit_tiny_patch16_224.safetensors

The pictures that the cells of a notebook end in, for its page, into docs/pictures/examples/:

    python tools/picture.py example what-it-looks-at

Accuracy against measured speed-up, of the first table of docs/results.md or of a frontier.csv of ``saccade tune``:

    python tools/picture.py frontier
    python tools/picture.py frontier runs/photos/frontier.csv --out frontier.png
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

import saccade
from saccade.data import Preprocess
from saccade.reports.frontier_picture import Point, frontier_picture
from saccade.reports.render_tokens import token_map

NUMBERS = ("speedup", "value", "value_low", "value_high")  # of a row of frontier.csv, in the order of a Point
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
PHOTO, PICTURE, FRONTIER = PICTURES / "cat.jpg", PICTURES / "settings.jpg", PICTURES / "frontier.png"
RESULTS, EXAMPLES = PICTURES.parent / "results.md", PICTURES.parents[1] / "examples"
WIDEST = 720  # pixels, of a notebook's picture
TITLE = "ViT-Ti/16, nothing trained: 1,000 Imagenette photos, PyTorch on a CPU, batch 32"
SETTINGS = ("tome(r=13)", "evit(0.7)", "quadtree(97)")
METHODS = [
    "algm()",
    "ats()",
    "cut()",
    "dpc_knn()",
    "evit(0.7)",
    "grid(32)",
    "imagepiece()",
    "kth()",
    "mctf()",
    "pitome()",
    "quadtree(97)",
    "radial()",
    "random(0.7)",
    "random_plus(0.7)",
    "tofu()",
    "token_pooling()",
    "tome(r=13)",
]
SIDE, GAP, LINE = 256, 12, 24  # pixels
QUALITY, SMALLER = 85, 65  # of the JPEGs: one for the README, many for the methods' pages


def main() -> None:
    """Write the picture that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("settings", "methods"):
        drawn = kinds.add_parser(kind)
        drawn.add_argument("model")
        drawn.add_argument("--weights", required=True)
    kinds.add_parser("example").add_argument("name", help="of a notebook in examples/")
    frontier = kinds.add_parser("frontier")
    frontier.add_argument("measured", nargs="?", type=Path, help="a frontier.csv; without: docs/results.md")
    frontier.add_argument("--out", type=Path, default=FRONTIER)
    asked = parser.parse_args()
    if asked.kind == "example":
        for place, picture in example(EXAMPLES / f"{asked.name}.ipynb"):
            picture.convert("RGB").save(PICTURES / "examples" / f"{asked.name}-{place}.jpg", quality=SMALLER)
        return
    if asked.kind != "frontier":
        model, photo = saccade.create_model(asked.model, weights=asked.weights), Image.open(PHOTO).convert("RGB")
        if asked.kind == "settings":
            board(model, photo, SETTINGS).save(PICTURE, quality=QUALITY)
            return
        for setting in METHODS:
            name = setting.partition("(")[0]
            board(model, photo, [setting]).save(PICTURES / "methods" / f"{name}.jpg", quality=SMALLER)
        return
    points = published() if asked.measured is None else tuned(asked.measured)
    frontier_picture(points, title=TITLE if asked.measured is None else "").save(asked.out, optimize=True)


def board(model: saccade.AdaptiveViT, photo: Image.Image, settings: Sequence[str]) -> Image.Image:
    """The photo and what settings make of it, side by side."""
    crop = Preprocess.of(model.vit, model.input_size()).crop(photo)
    panels = [("the photo, 196 tokens", Image.fromarray(crop.permute(1, 2, 0).numpy()))]
    for setting in settings:
        view = model.at(setting).eval()
        left = saccade.view(model, photo, setting).tokens[-1]
        panels.append((f"{setting}, {left} left", token_map(view, photo)))
    board = Image.new("RGB", (len(panels) * (SIDE + GAP) + GAP, SIDE + LINE + 2 * GAP), "white")
    draw, font = ImageDraw.Draw(board), ImageFont.load_default(15)
    for place, (title, panel) in enumerate(panels):
        left = GAP + place * (SIDE + GAP)
        draw.text((left, GAP), title, fill=(24, 28, 34), font=font)
        board.paste(panel.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, GAP + LINE))
    return board


def example(notebook: Path) -> Iterator[tuple[int, Image.Image]]:
    """Run a notebook, and give the places of cells that end in a picture, and the pictures."""
    known: dict[str, Any] = {}
    for place, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        tree = ast.parse("".join(cell["source"]) if cell["cell_type"] == "code" else "")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{notebook.name}, cell {place}", "exec"), known)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"{notebook.name}, cell {place}", "eval"), known)
            picture = value if isinstance(value, Image.Image) else getattr(value, "picture", None)
            if isinstance(picture, Image.Image):
                picture.thumbnail((WIDEST, WIDEST))
                yield place, picture


def published() -> list[Point]:
    """The settings of the first table of docs/results.md: accuracy on 1,000 Imagenette photos, and speed-up."""
    text = RESULTS.read_text(encoding="utf-8").partition("| ViT-Ti/16, training-free |")[2].partition("\n\n")[0]
    points = []
    for line in text.splitlines()[2:]:
        name, _, _, _, accuracy, _, _, speedup, _ = (part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1])
        setting = name.strip("`").replace("\\|", "|")
        family = "dense" if setting.startswith(("dense", "grid")) else setting.partition("(")[0]
        family = family if family in ("dense", "random") else "reduction"
        points.append(Point(setting, family, float(speedup.rstrip("×")), float(accuracy.rstrip(" %")) / 100))
    return points


def tuned(file: Path) -> list[Point]:
    """The settings of a frontier.csv that have accuracy and speed."""

    def point(row: dict[str, str]) -> Point:
        speedup, value, low, high = (float(row[name]) for name in NUMBERS)
        return Point(row["setting"], row["family"], speedup, value, low, high, row["chosen"] == "True")

    with file.open(encoding="utf-8", newline="") as lines:
        return [point(row) for row in csv.DictReader(lines) if row["value"] and row["speedup"]]


if __name__ == "__main__":
    main()
