"""``tome``: merge the r most similar pairs of tokens in every block (ToMe, arXiv 2210.09461)."""

from __future__ import annotations

from functools import partial

from saccade.core.plan import Backbone, Method
from saccade.core.registry import also, register
from saccade.methods.common.arguments import exact_schedule, one_of, schedule, switch
from saccade.methods.common.budget import fit
from saccade.methods.common.matching import METRICS, BipartiteMerge

resolve = partial(schedule, "tome")


def _menu(backbone: Backbone) -> list[str]:
    shares = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    rates = sorted({max(1, round(share * backbone.num_patches / backbone.depth)) for share in shares})
    return [f"tome(r={r})" for r in rates]


@also(counts=("r",))
@register("tome", sources={"paper": "r inflection metric proportional"}, menu=_menu)
def tome(
    backbone: Backbone,
    r: int | tuple = 13,
    inflection: float = 0.0,
    total: int | None = None,
    metric: str = "key",
    proportional: bool = True,
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Token merging: average the r most similar pairs in every block (arXiv 2210.09461).

    Args:
        r: patch tokens merged away in each block, or a list with one number per block.
        inflection: -1 merges 2r in the first block falling to 0 in the last, +1 the reverse, 0 the same everywhere.
        total: patch tokens merged away in all blocks together, exactly, instead of r (whose schedules round down).
        metric: similarity of the mean 'key' over heads, or of the features 'x'.
        proportional: attention counts a merged token as often as it has patches; False (better without supervision,
            says the paper): once.
        gmacs: find the total for this many GMACs per image (at its own size) instead.
        speed: find the total for this many times fewer MACs instead.
    """
    width = backbone.head_dim if one_of("tome", "metric", metric, METRICS) == "key" else backbone.dim
    switch("tome", "proportional", proportional)

    def build(rates: list[int]) -> Method:
        return Method((i, BipartiteMerge(v, width, metric, proportional)) for i, v in enumerate(rates) if v)

    depth = backbone.depth
    if gmacs is not None or speed is not None:
        most = depth * backbone.num_patches // 2
        return fit("tome", backbone, lambda n: build(exact_schedule("tome", n, inflection, depth)), most, gmacs, speed)
    if total is not None:
        return build(exact_schedule("tome", total, inflection, depth))
    return build(schedule("tome", r, inflection, depth))
