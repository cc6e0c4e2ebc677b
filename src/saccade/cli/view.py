"""``saccade view``: what each token stands for."""

from __future__ import annotations

from typing import Annotated

import typer

from saccade.cli.application import app
from saccade.cli.common import Device, Json, Model, NumClasses, Pretrained, Settings, Weights, open_model, print_json


@app.command("view")
def command(
    model: Model,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A photo; or a folder or zip of images.")],
    setting: Settings = [],  # noqa: B006  (typer reads it)
    out: Annotated[str, typer.Option(help="The PNG to write.")] = "tokens.png",
    weights: Weights = None,
    pretrained: Pretrained = False,
    num_classes: NumClasses = None,
    limit: Annotated[int, typer.Option(min=1, help="Of a folder, use at most this many images, spread evenly.")] = 200,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """A picture of what each token stands for, block by block; of a folder, what its images use of each block.

    Example: saccade view vit_tiny_patch16_224 photo.jpg --pretrained -s "tome(r=13)" --out photo.png
    """
    import os

    from saccade.analysis.usage import usage
    from saccade.errors import UserError
    from saccade.reports import view
    from saccade.terminal.progress import Progress

    if len(setting) > 1:
        raise UserError(f"view draws one setting and {len(setting)} were given; run it once for each")
    vit = open_model(model, weights, pretrained, device, num_classes=num_classes)
    if os.path.isdir(image) or image.endswith(".zip"):
        with Progress(shown=True) as progress:
            found = usage(vit, image, setting[0] if setting else None, out=out, limit=limit, progress=progress)
        facts = {"images": len(found.names), "gmacs": found.gmacs.mean().item(), "correlation": found.correlation()}
        if json:
            print_json({"out": out, "units": found.units, "share": found.share.mean(0).tolist(), **facts})
        else:
            cost = f"{facts['gmacs']:.3f} GMACs each, ρ = {facts['correlation']:+.2f} with {found.against}"
            print(f"{out}: {facts['images']} images, {cost}")
        return
    picture, tokens = view(vit, image, setting[0] if setting else None, out=out)
    if json:
        print_json({"out": out, "size": list(picture.size), "tokens": tokens})
    else:
        print(f"{out}: {len(tokens)} blocks, {tokens[0]} to {tokens[-1]} tokens")
