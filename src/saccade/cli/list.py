"""``saccade list``: what a setting may name."""

from __future__ import annotations

from saccade.cli import app
from saccade.cli.common import Json, print_json, print_table


@app.command("list")
def command(json: Json = False) -> None:
    """Methods and tokenizers that a setting may name, with their knobs."""
    from saccade.plan import registry

    entries = registry().values()
    knobs = {e.name: [str(p).split(":")[0] + _default(p) for p in e.knobs.values()] for e in entries}
    if json:
        print_json([{"name": e.name, "kind": e.kind, "knobs": knobs[e.name], "summary": e.summary} for e in entries])
        return
    rows = [[f"{e.name}({', '.join(knobs[e.name])})", e.kind, e.summary] for e in entries]
    print_table("Settings are built from these, joined by ' | '; the tokenizer comes first", ["name", "kind", ""], rows)


def _default(parameter) -> str:  # type: ignore[no-untyped-def]
    return "" if parameter.default is parameter.empty else f"={parameter.default!r}"
