"""``saccade stem``: a convolutional stem in place of the patch embedding, fitted without training."""

from __future__ import annotations

from typing import Annotated

import typer

from saccade.cli.application import app
from saccade.cli.common import Json, NumClasses, Pretrained, Weights, open_model, print_json


@app.command("stem")
def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A timm name, hf-hub:owner/name, local-dir:FOLDER, or a folder that Saccade saved."
        ),
    ],
    data: Annotated[str, typer.Argument(metavar="[DATA]", help="Folder or zip of images to fit on.")] = "scenes",
    out: Annotated[str, typer.Option(help="Folder for the model.")] = "runs/stem",
    weights: Weights = None,
    pretrained: Pretrained = False,
    num_classes: NumClasses = None,
    limit: Annotated[int, typer.Option(min=2, help="Use at most this many images, spread evenly.")] = 256,
    json: Json = False,
) -> None:
    """Four overlapping convolutions that give nearly the tokens of the patch embedding (arXiv 2412.16491): stem().

    The patch embedding stays beside it: "grid() | …" runs without the stem, "stem() | …" with it. Train either.

    Example: saccade stem vit_tiny_patch16_224 photos/ --out stemmed --pretrained
    """
    from saccade.backbones.saving import check_savable, save
    from saccade.conversion.stem_fit import fit_stem, read_images, token_error
    from saccade.storage.model_folder import check_place
    from saccade.storage.run_folder import check_apart
    from saccade.terminal.progress import Progress

    check_place(out)
    check_apart(out, [source, data, weights])
    model = open_model(source, weights, pretrained, device="cpu", num_classes=num_classes)
    check_savable(model)
    with Progress(shown=True) as progress:
        images = read_images(model, data, limit, progress)
        held = max(1, len(images) // 5)
        made = fit_stem(model, images[held:], limit=limit, progress=progress)
    error = token_error(made, images[:held])
    save(made, out)
    facts = {"images": len(images) - held, "error": error}
    if json:
        print_json({"folder": out, **facts})
        return
    print(f"{out}: stem() fitted on {facts['images']} images; on {held} others its tokens are off by {error:.2%}")
    print("of their variance (0: the patch embedding's own). Evaluate it before you train it.")
