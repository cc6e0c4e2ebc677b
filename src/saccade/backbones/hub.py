"""``save_pretrained``, ``from_pretrained`` and ``push_to_hub``, as models on the Hugging Face hub have them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download

from saccade.errors import UserError
from saccade.storage.architecture import ACTS, MLPS, NORMS, arguments
from saccade.storage.files import shortened, write_text
from saccade.storage.folder_config import CONFIG
from saccade.storage.weights import line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from saccade.model import AdaptiveViT

CARD = "README.md"
FILES = (CONFIG, "model.safetensors", CARD)
COLUMNS = ("setting", "value", "gmacs", "images_per_s", "speedup")  # of a frontier's rows


class HubNames(ModelHubMixin):
    """huggingface_hub's own methods over the folders that ``save`` writes and ``load`` reads."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Without the mixin's record of arguments: the folder's config says what the model is."""
        return object.__new__(cls)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the model's folder, as ``save`` does, and a model card unless there is one.

        Args:
            config: not used: what the model is stands in the folder's own.
            repo_id: on the hub; the folder's name unless it is given.
            push_to_hub: also do that, with ``push_to_hub_kwargs``.
            model_card_kwargs: of ``generate_model_card``, such as ``{"rows": tuned.rows}``.

        Returns:
            The address of the commit on the hub, where it was pushed.

        Raises:
            UserError: as ``save``.
        """
        folder, told = Path(save_directory), model_card_kwargs or {}
        card = self.generate_model_card(**told)
        cast("AdaptiveViT", self).save(str(folder))
        if not (folder / CARD).exists():
            write_text(folder / CARD, str(card))
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=told, **push_to_hub_kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        setting: str | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Any:
        """What ``saccade.load`` gives of a folder, or of a model on the hub that was saved so.

        Args:
            setting: in the place of its own.
            force_download, token, cache_dir, local_files_only, revision: as huggingface_hub has them.

        Raises:
            UserError: as ``load``; a name that the hub has not, or no network.
        """
        from saccade import load  # type: ignore[attr-defined]

        how = {"force_download": force_download, "local_files_only": local_files_only}
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = downloaded(str(folder), revision=revision, token=token, cache_dir=cache_dir, **how)
        return load(folder, setting)

    def generate_model_card(self, rows: Sequence[Any] = (), **more: Any) -> ModelCard:
        """What the model is, what it costs, and how it is used, with Saccade and without.

        Args:
            rows: of a frontier, as ``saccade.tune(…).rows`` and ``saccade.eval(…)`` have them, for a table.
            more: fields of the card's header: ``license``, ``datasets``, …
        """
        model = cast("AdaptiveViT", self)
        cfg = model.vit.pretrained_cfg
        task = "image-classification" if model.task_head is None and model.num_classes else "image-feature-extraction"
        known = {"license": cfg["license"]} if cfg.get("license") else {}
        tags = ["saccade", "timm", "adaptive-compute", *dict.fromkeys(call.name for call in model.setting.calls)]
        data = ModelCardData(library_name="saccade", pipeline_tag=task, tags=tags, **known | more)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(model, rows)}")


def downloaded(name: str, **how: Any) -> Path:
    """The folder of a model on the hub, its files and no others. Raises UserError where it is not to be had."""
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES), **how))
    except Exception as error:
        raise UserError(f"cannot fetch {shortened(name)} from the hub: {type(error).__name__}: {line(error)}") from None


def _text(model: AdaptiveViT, rows: Sequence[Any]) -> str:
    vit, (height, width) = model.vit, model.input_size()
    name, setting = str(vit.pretrained_cfg.get("architecture", type(vit).__name__)), str(model.setting) or "dense"
    weight = vit.patch_embed.proj.weight
    image = torch.zeros(1, weight.shape[1], height, width, dtype=weight.dtype, device=weight.device)
    with torch.inference_mode():
        tokens, trace = model.forward_tokens(image)
    facts = {
        "setting": f"`{setting}`",
        "trained for": ", ".join(f"`{s}`" for s in model.trained) or "–",
        "input": f"{height} × {width} pixels",
        "tokens after the last block": f"{tokens.x.shape[1]} (of a blank image, where their number depends on it)",
        "GMACs": f"{trace.macs().item() / 1e9:.3f}, of the same image",
        "parameters": f"{sum(p.numel() for p in vit.parameters()) / 1e6:.1f} M",
    }
    table = "\n".join(f"| {what} | {said} |" for what, said in facts.items())
    return _CARD.format(name=name, setting=setting, table=table, args=_arguments(model), frontier=_frontier(rows))


def _arguments(model: AdaptiveViT) -> str:
    """What timm is asked for, as Python, to open the weights without Saccade."""
    asked = arguments(model.vit, model.vit.pretrained_cfg.get("architecture", ""))
    eps = asked.pop("norm_eps", None)
    said = {knob: _layer(value) if knob.endswith("_layer") else repr(value) for knob, value in asked.items()}
    if eps is not None and "norm_layer" in said:
        said["norm_layer"] = f"partial({said['norm_layer']}, eps={eps!r})"
    return ", ".join(f"{knob}={value}" for knob, value in said.items())


def _layer(name: str) -> str:
    if name in MLPS:
        return f"timm.layers.{name}"
    known = {**ACTS, **NORMS}[name]
    at = "torch.nn" if name.startswith("nn.") or known.__module__.startswith("torch.") else "timm.layers"
    return f"{at}.{known.__name__}"


def _frontier(rows: Sequence[Any]) -> str:
    if not rows:
        return ""
    lines = [[_cell(getattr(row, name, None)) for name in COLUMNS] for row in rows]
    named = [getattr(rows[0], "metric", "") or name if name == "value" else name for name in COLUMNS]
    head = f"| {' | '.join(named)} |\n|{'---|' * len(COLUMNS)}"
    return "\n## Frontier\n\n" + "\n".join([head, *(f"| {' | '.join(cells)} |" for cells in lines)]) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


_CARD = """# {name} under `{setting}`

A Vision Transformer with adaptive compute, by Saccade.

| | |
|---|---|
{table}

```python
import saccade

model = saccade.AdaptiveViT.from_pretrained("…")  # this folder, or its name on the hub
logits = model(images).logits
predictor = saccade.Predictor(model)  # paths or PIL images in, label names out
```

The weights are timm's, under `vit.`, and run dense without Saccade:

```python
from functools import partial

import timm, torch
from safetensors.torch import load_file

vit = timm.create_model("{name}", {args})
state = load_file("model.safetensors")
vit.load_state_dict({{k.removeprefix("vit."): v for k, v in state.items() if k.startswith("vit.")}})
```
{frontier}"""
