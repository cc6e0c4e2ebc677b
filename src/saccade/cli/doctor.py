"""``saccade doctor``: what this machine has, and what would make it faster."""

from __future__ import annotations

from saccade.cli.application import app
from saccade.cli.common import Json, Threads, print_json, print_result, use_threads


@app.command("doctor")
def command(threads: Threads = None, json: Json = False) -> None:
    """Processor and number types, threads, allocator, versions, engines found and missing, what autotune measured.

    Example: saccade doctor
    """
    from saccade.evaluation.doctor import doctor

    use_threads(threads)
    found = doctor()
    if json:
        print_json(found.to_dicts())
        return
    print_result(found)
