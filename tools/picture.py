"""The picture of the README, made anew: what three settings look at, on one photo.

python tools/picture.py vit_tiny_patch16_224 --weights vit_tiny_patch16_224.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import saccade
from saccade.data import Preprocess
from saccade.reports.render_tokens import token_map

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
PHOTO, PICTURE = PICTURES / "cat.jpg", PICTURES / "settings.jpg"
SETTINGS = ("tome(r=13)", "evit(0.7)", "quadtree(97)")
SIDE, GAP, LINE, QUALITY = 256, 12, 24, 85  # pixels; of the JPEG


def main() -> None:
    """Write the picture beside the photo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--weights", required=True)
    asked = parser.parse_args()
    model = saccade.create_model(asked.model, weights=asked.weights)
    photo = Image.open(PHOTO).convert("RGB")
    crop = Preprocess.of(model.vit, model.input_size()).crop(photo)
    panels = [("the photo, 196 tokens", Image.fromarray(crop.permute(1, 2, 0).numpy()))]
    for setting in SETTINGS:
        view = model.at(setting).eval()
        left = saccade.view(model, photo, setting).tokens[-1]
        panels.append((f"{setting}, {left} left", token_map(view, photo)))
    board = Image.new("RGB", (len(panels) * (SIDE + GAP) + GAP, SIDE + LINE + 2 * GAP), "white")
    draw, font = ImageDraw.Draw(board), ImageFont.load_default(15)
    for place, (title, panel) in enumerate(panels):
        left = GAP + place * (SIDE + GAP)
        draw.text((left, GAP), title, fill=(24, 28, 34), font=font)
        board.paste(panel.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, GAP + LINE))
    board.save(PICTURE, quality=QUALITY)


if __name__ == "__main__":
    main()
