"""Schedules in milliseconds: at equal measured time, is one that was found for time better than one found for MACs?

Claim     At batch 1 deciding takes time that MACs do not tell, so a search that is priced by a device's latency curve
          finds better schedules for that device than one that is priced in MACs. No paper says so of these methods.
Method    A pretrained model, nothing trained, in the runner that one would deploy. Half of the photos choose: for each
          MAC ratio the nearest schedule of a search in MACs (``studies/schedules.py``), whose time is measured; then
          the nearest of a search in milliseconds, within the time that the curve tells of the first, and of its three
          nearest the first that takes no longer. All are timed in one interleaved run with the dense model; the other
          half of the photos reports KL, top-1 and paired differences, 95 % intervals over images. With ``--wide`` the
          model is twice as wide (ViT-Ti as ViT-S) and computes the same: every channel, head and hidden unit stands
          there twice, with half of the weight. So time and MACs are those of the larger model, and the answers those
          of weights that were trained.
Command   python studies/milliseconds.py vit_tiny_patch16_224 vit_tiny_patch16_224.safetensors inval227_dev.zip
          --runner "openvino bf16" --batch 1 --out runs/milliseconds
Cost      an estimate: 25 minutes of two cores, alone on the machine for the times; searches go on where they stopped
Expected  nearer to the dense model at no more time
Measured  docs/results.md
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from typing import cast

import timm
import torch
from jobs import parser_of
from widened import widen

import saccade
from saccade.core.timm_types import ViT
from saccade.data import open_images
from saccade.evaluation.allowance import Allowance
from saccade.evaluation.candidates import price
from saccade.evaluation.device_curve import curve_of
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.prediction_cache import Cache
from saccade.evaluation.schedule import Space
from saccade.evaluation.schedule_candidates import schedules
from saccade.evaluation.schedule_price import TIME_MARGIN, Price, macs, milliseconds, points
from saccade.evaluation.speed import Speed, time_together
from saccade.evaluation.stats import paired_difference
from saccade.evaluation.successive_halving import shuffled_halves
from saccade.runners.runner import Runner
from saccade.storage.files import write_json


def main() -> None:
    parser = parser_of(__doc__, "runs/milliseconds", "model", "weights")
    parser.add_argument("data", help="photos with labels")
    parser.add_argument("--split")
    parser.add_argument("--runner", default="openvino", help="to deploy in")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--speeds", type=float, nargs="+", default=[2.0], help="times fewer MACs, for the first search")
    parser.add_argument("--tries", type=int, default=150)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--wide", help="a timm model of twice the width, to compute the same in")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, runner = saccade.create_model(given.model, weights=given.weights).eval(), Runner.of(given.runner)
    priced = model  # what takes the time; the other one gives the same answers
    if given.wide:
        priced = saccade.AdaptiveViT(widen(model.vit, cast(ViT, timm.create_model(given.wide)))).eval()
    evaluator = Evaluator(model, open_images(given.data, given.split))
    store = Cache.of(given.out / "cache", evaluator)
    select, report = shuffled_halves(len(evaluator.images), 0, evaluator.labels)
    space = Space.of(priced)
    curve = curve_of(priced, points(space), runner=runner, batch=given.batch, seconds=given.seconds)
    dense_ms = curve.predict(priced.at("dense").eval())
    assert dense_ms is not None  # a curve knows the dense model
    rows = []
    for speed in given.speeds:
        search = partial(schedules, evaluator, select, allowance=Allowance(), tries=given.tries, folder=store.folder)
        name = f"{speed} {given.wide or given.model}"
        by_macs = search(partial(told, space, macs(space, speed, name))).candidates[0].setting
        limit = curve.predict(priced.at(by_macs).eval())
        assert limit is not None
        print(f"{speed}×: {by_macs} takes {limit:.3f} of {dense_ms:.3f} ms by the curve", file=sys.stderr, flush=True)
        in_ms = milliseconds(space, TIME_MARGIN * limit, dense_ms, runner, given.batch, name)
        by_time = [candidate.setting for candidate in search(partial(told, space, in_ms)).candidates]
        base = priced.deploy(Runner(runner.dtype, runner.engine, given.batch))
        views = {s: base.at(s).eval() for s in ("dense", by_macs, *by_time)}
        timed = dict(zip(views, time_together(views, given.batch, given.seconds), strict=True))
        no_slower = [s for s in by_time if timed[s].p50_ms <= timed[by_macs].p50_ms]
        chosen = next(iter(no_slower), min(by_time, key=lambda s: timed[s].p50_ms))
        settings = {"dense": "dense", "found for MACs": by_macs, "found for time": chosen}
        rows += compared(evaluator, store, report, priced, timed, speed, settings)
        write_json(given.out / "milliseconds.json", {"rows": rows})
    print(json.dumps(rows, indent=2, ensure_ascii=False))


def told(space: Space, given: Price, _: Space) -> Price:
    """A price for the search of another model's schedules, by what they cost in this one."""
    return replace(given, cost=lambda _, schedule: given.cost(space, schedule))


def compared(
    evaluator: Evaluator,
    store: Cache,
    report: list[int],
    priced: saccade.AdaptiveViT,
    timed: dict[str, Speed],
    speed: float,
    settings: dict[str, str],
) -> list[dict]:
    """A row for each schedule: time in the runner, KL and top-1 on the half that reports, against the other one."""
    rows, said = [], {}
    for name, setting in settings.items():
        view = evaluator.dense.at(setting).eval()
        found = store.get(setting, report, partial(evaluator.predict, view, report))
        said[name] = found.at(found.indices.argsort())
        hits = evaluator.hits(said[name]).double()
        entry = {"speed": speed, "schedule": name, "setting": setting, "gmacs": price(priced, setting) / 1e9}
        entry |= {"ms": timed[setting].p50_ms, "speedup": timed[setting].speedup, "kl": found.kl.double().mean().item()}
        entry |= {"top1": hits.mean().item(), "images": len(hits)}
        entry["against dense"] = paired_difference(hits, evaluator.hits(said["dense"]).double()).three()
        if name == "found for time":
            other = said["found for MACs"]
            entry["against the other, top-1"] = paired_difference(hits, evaluator.hits(other).double()).three()
            entry["against the other, KL"] = paired_difference(said[name].kl.double(), other.kl.double()).three()
        rows.append(entry)
        print(json.dumps(entry, ensure_ascii=False), file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
