"""``saccade convert``: a model for another patch size, without training."""

from __future__ import annotations

from typing import Annotated

import typer

from saccade.cli.application import app
from saccade.cli.common import Json, NumClasses, Pretrained, Weights, open_model, print_json


@app.command("convert")
def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A timm name, hf-hub:owner/name, local-dir:FOLDER, or a folder that Saccade saved."
        ),
    ],
    patch: Annotated[str, typer.Option(help="New patch size in pixels: 16; 14:16 also checks that the source has 14.")],
    out: Annotated[str, typer.Option(help="Folder for the model.")],
    size: Annotated[
        int | None, typer.Option(help="Input size in pixels; by default as many patches as the source has.")
    ] = None,
    resize: Annotated[
        str | None, typer.Option(help="default (antialiased bilinear), google (FlexiViT's weights) or timm (bicubic).")
    ] = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    num_classes: NumClasses = None,
    json: Json = False,
) -> None:
    """A plain model for another patch size: kernel PI-resized, positions resized, no training. See docs/convert.md.

    Example: saccade convert vit_small_patch14_dinov2 --patch 14:16 --out dino16 --pretrained
    """
    from saccade.conversion.flexify import convert
    from saccade.storage.model_folder import check_place
    from saccade.storage.run_folder import check_apart

    check_place(out)
    check_apart(out, [source, weights])
    model = open_model(source, weights, pretrained, device="cpu", num_classes=num_classes)
    made = convert(model, patch, out, size=size, resize=resize)
    (oh, ow), (h, w) = model.backbone.patch_size, made.backbone.patch_size
    (height, width), scale, tokens = made.input_size(), (h * w) / (oh * ow), made.backbone.num_patches
    if json:
        facts = {"patch": [h, w], "size": [height, width], "tokens": tokens, "scale": scale}
        print_json({"folder": out, **facts})
        return
    print(f"{out}: patches {oh}x{ow} -> {h}x{w}, input {height}x{width}, {tokens} patch tokens")
    if scale != 1:
        print(f"A kernel resized like an image would give tokens {scale:.2f} times as large; these keep their scale.")
