"""What images use of each block, over a data set: patches, branches, heads as colours; and cost against difficulty."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from saccade.core.gates import Gates
from saccade.core.record import BlockTrace
from saccade.data import ImageSet, Loader, Preprocess, head_labels, open_images
from saccade.evaluation.accuracy import spread
from saccade.evaluation.defined import require_finite
from saccade.evaluation.evaluator import check_head
from saccade.evaluation.stats import rank_correlation
from saccade.model import AdaptiveViT
from saccade.storage.files import check_picture, write_picture
from saccade.terminal.progress import Progress
from saccade.terminal.results import Result

PARTS = ("patches", "attention", "MLP")  # and then the heads


@dataclass(frozen=True, repr=False)
class Usage(Result):
    """What n images use of L blocks, and what they cost."""

    share: Tensor  #    [n, L, 3 + H]  of patch tokens computed, of branches, of heads: 0 … 1
    gmacs: Tensor  #    [n] float64  that ran, 10^9
    loss: Tensor  #     [n] float64  of the dense model (against its own best class, without labels); see ``against``
    names: list[str]  # of the images
    against: str = "the dense model's loss"  # what ``loss`` is; of an encoder how far the embedding is from dense

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each image: its cost, the dense model's loss, and the mean share of each unit over blocks."""
        share = [dict(zip(self.units, mean, strict=True)) for mean in self.share.mean(1).tolist()]
        facts = zip(self.names, self.gmacs.tolist(), self.loss.tolist(), share, strict=True)
        return [{"image": name, "gmacs": cost, "loss": loss, **used} for name, cost, loss, used in facts]

    @property
    def units(self) -> list[str]:
        """What the last axis of ``share`` counts."""
        return [*PARTS, *(f"head {h}" for h in range(self.share.shape[2] - len(PARTS)))]

    def correlation(self) -> float:
        """Spearman's ρ of cost and ``loss``; 0 where all cost alike."""
        return rank_correlation(self.gmacs, self.loss)


def usage(
    model: AdaptiveViT,
    data: str | os.PathLike | ImageSet,
    setting: str | None = None,
    *,
    out: str | os.PathLike | None = None,
    split: str | None = None,
    limit: int | None = 200,
    batch: int = 16,
    progress: Progress | None = None,
) -> Usage:
    """What images use of each block under a setting.

    Args:
        data: a folder or zip of images, with classes or without.
        setting: None: the model's own.
        out: a PNG to write: the mean over all images, three of them, and cost against difficulty.
        limit: at most this many images, evenly spread.

    Raises:
        UserError: bad setting or data.
    """
    check_head(model, encoders=True)  # cost is held against its loss
    encodes = not model.vit.num_classes
    view, dense = (model if setting is None else model.at(setting)).eval(), model.at("dense").eval()
    if out is not None:
        check_picture(out)  # before the work
    images = data if isinstance(data, ImageSet) else open_images(os.fspath(data), split)
    labelled = images.labels is not None and not encodes
    known = torch.tensor(head_labels(images, model.vit).indices) if labelled else None
    chosen = spread(len(images), limit)
    progress = progress or Progress()
    for line in images.notes:
        progress.say(line)
    advance = progress.start("looking", len(chosen))
    shares, costs, losses, names = [], [], [], []
    sizes = [view.input_size(), dense.input_size()]
    loaders = [Loader(images, Preprocess.of(model.vit, size)) for size in dict.fromkeys(sizes)]
    weight = next(model.parameters())
    for seen in zip(*(loader.batches(batch, chosen) for loader in loaders), strict=True):
        own, whole = (part.images.to(weight.device, weight.dtype) for part in (seen[0], seen[-1]))
        with torch.inference_mode():
            ran = view(own)
            require_finite(ran.logits, view.setting)
            masks = view.forward_tokens(own, sparse=False)[1]
            given = require_finite(dense(whole).logits, dense.setting).double().cpu()
        start = _tokens(masks.first)
        shares.append(torch.stack([_used(block, start, view.backbone.heads) for block in masks.blocks], dim=1))
        costs.append(ran.trace.macs().cpu() / 1e9)
        truth = given.argmax(-1) if known is None else known[seen[0].indices]
        same = F.cosine_similarity(given, ran.logits.double().cpu(), dim=-1)
        losses.append(1 - same if encodes else F.cross_entropy(given, truth, reduction="none"))
        names += [images.names[i] for i in seen[0].indices]
        advance(len(own))
    against = "1 − cosine to the dense embedding" if encodes else Usage.against
    found = Usage(torch.cat(shares).cpu(), torch.cat(costs), torch.cat(losses), names, against)
    if out is not None:
        write_picture(out, draw_usage(found, str(view.setting)))
    return found


def _used(block: BlockTrace, start: Tensor, heads: int) -> Tensor:
    """Shares of one block, [B, 3 + H]."""
    gates, images = block.gates or Gates(), len(start)
    ones = torch.ones(images, 1, device=start.device)
    patches = _tokens(block.owner) / start if gates.patch is None else gates.patch.float().mean(1)
    branches = [ones if gate is None else gate.float().unsqueeze(1) for gate in (gates.attn, gates.mlp)]
    own = ones.expand(-1, heads) if gates.head is None else gates.head.float()
    return torch.cat([patches.unsqueeze(1).float(), *branches, own * branches[0]], dim=1)


def _tokens(owner: Tensor) -> Tensor:
    """Patch tokens of each image that own a cell, [B]."""
    taken = torch.zeros(owner.shape[0], owner.shape[1] + 1, device=owner.device)
    return taken.scatter(1, owner + 1, 1.0)[:, 1:].sum(1)


def draw_usage(found: Usage, title: str) -> Image.Image:
    """Block × unit as colours: the mean over all images, the cheapest, the median and the dearest; cost and loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    order = found.gmacs.argsort(stable=True).tolist()
    some = {"cheapest": order[0], "median": order[len(order) // 2], "dearest": order[-1]}
    grid = figure.add_gridspec(2, 6)
    shown = _heat(figure.add_subplot(grid[0, :4]), found.share.mean(0), found.units, f"{title}, {len(order)} images")
    figure.colorbar(shown, label="share used")
    for place, (what, i) in enumerate(some.items()):
        name = f"{what}: {found.names[i].rsplit('/', 1)[-1]}, {found.gmacs[i]:.3g} GMACs"
        _heat(figure.add_subplot(grid[1, 2 * place : 2 * place + 2]), found.share[i], found.units, name)
    plot = figure.add_subplot(grid[0, 4:])
    plot.scatter(found.loss, found.gmacs, s=8, alpha=0.5)
    plot.set(xlabel=found.against, ylabel="GMACs", title=f"cost and difficulty, ρ = {found.correlation():+.2f}")
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=110)
        return Image.open(buffer).convert("RGB")


def _heat(axes: Any, share: Tensor, units: list[str], title: str) -> Any:
    """One matrix [L, U] of shares."""
    axes.set_title(title, fontsize=9)
    axes.set_xticks(range(len(units)), units, rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("block", fontsize=8)
    return axes.imshow(share.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
