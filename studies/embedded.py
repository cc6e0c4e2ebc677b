"""Make the model that comes with the package out of finished runs of ``saccade train scenes``.

Claim     None of its own: it makes a model, and measures that.
Method    A model of half the width is trained, widened so that it computes the same, and trained on. It is stored in
          half precision, opened again, and tested on the 10,000 test scenes, which no step and no choice of a run has
          seen. The card and the log of the second run are written beside it.
Command   saccade train scenes --out runs/narrow
          python studies/widened.py runs/narrow/model --heads 4 --spread 0.25 --out runs/wide
          saccade train scenes model.name=runs/wide "model.args={}" "sampling.weights=[2,1,1,1,1,1,1]" optim.lr=6e-4
          run.epochs=4 run.check_every=1 run.precision=bf16 --out runs/scenes
          python studies/embedded.py runs/scenes src/saccade/assets/scenes
Cost      about two hours of one core, and ten minutes
Measured  src/saccade/assets/scenes/README.md
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import saccade
from saccade.backbones.saving import save
from saccade.evaluation.accuracy import Score
from saccade.evaluation.stats import Interval
from saccade.storage.files import write_json, write_text

CARD = """# The built-in model

A small elastic ViT for `make demo`, the tests and trying things out offline. **It knows ten shapes on generated scenes
and nothing else: it is of no use for photos**, and its accuracies say nothing about any method on real images.

* **Architecture**: timm `vit_tiny_patch16_224` with width {width}, 6 blocks, 4 heads, {parameters:.2f} M parameters,
  128 px, patch 16; {megabytes:.1f} MB in half precision.
* **Data**: `scenes` (`saccade/data/scenes.py`): ten classes of bright shapes at any place, angle and scale from 27 to
  58 pixels, on dark 1/f backgrounds with textures and one to three things that are none of the classes. 40,000 for
  training, 2,000 to choose by, 10,000 to test. No photo, no download.
* **Training**: `saccade train scenes` at half the width, {before[step]:,} steps, small inputs first
  (`saccade/configs/scenes.toml`); widened so that it computes the same (`studies/widened.py`); then {epochs:g} epochs
  in {steps:,} steps, {images:,} views, {gmacs:,.0f} GMACs (forward and backward), {minutes:.0f} minutes on one CPU core
  beside other work, one setting a step. The commands are in `studies/embedded.py`;
  `metrics.csv` and `checks.csv` are the log of the second run. The weights are those of its step {step:,}, the best on
  the validation scenes.

| setting | GMACs | MAC ratio | top-1, 10,000 test scenes | points vs dense |
|---|---|---|---|---|
{rows}

95 % intervals, paired where differences are meant. `random(0.5)` and `grid(32)` were not trained for.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    run: Path = arguments.run

    model = saccade.load(run / "model")
    told = json.loads((run / "model" / "config.json").read_text())["saccade"]
    facts = json.loads(max((run / "checkpoints").glob("last-*/state.json")).read_text())
    start = json.loads((Path(facts["config"]["model"]["name"]) / "config.json").read_text())["saccade"]["trained"]
    trained = {key: told["trained"][key] for key in ("images", "step", "seed", "checked")}
    save(model.half(), arguments.out, classes=told["classes"], trained=trained)
    for name in ("metrics.csv", "checks.csv"):
        shutil.copyfile(run / name, arguments.out / name)

    stored = saccade.load(arguments.out)
    settings = [s for s in stored.trained if s != "dense"]
    scores, failures = saccade.eval(
        str(arguments.out), "scenes", [*settings, "random(0.5)", "grid(32)"], split="test", batch=64
    )
    assert not failures
    rows = [f"| `{s.setting}` | {s.gmacs:.4f} | {s.mac_ratio:.2f}× | {_three(s.value)} | {_away(s)} |" for s in scores]
    card = CARD.format(
        width=stored.vit.embed_dim,
        before=start,
        parameters=sum(p.numel() for p in stored.parameters()) / 1e6,
        megabytes=(arguments.out / "model.safetensors").stat().st_size / 1e6,
        epochs=facts["config"]["run"]["epochs"],
        steps=facts["step"],
        images=facts["images"],
        gmacs=sum(facts["spent"]),
        minutes=facts["seconds"] / 60,
        step=told["trained"]["step"],
        rows="\n".join(rows),
    )
    write_text(arguments.out / "README.md", card)
    write_json(run / "test.json", [s.to_dict() for s in scores])
    print(card)


def _three(interval: Interval) -> str:
    return f"{interval.mean:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def _away(score: Score) -> str:
    if score.delta is None or score.setting == "dense":
        return ""
    mean, low, high = (f"{100 * v:+.1f}" for v in score.delta.three())
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    main()
