"""Settings from anywhere: a line is refused in one line, or it prints as it is read and what it builds runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attack import attempt
from oracles import make_images, make_vit
from saccade.core.registry import registry
from saccade.errors import UserError
from saccade.evaluation.sweep import expanded
from saccade.model import AdaptiveViT
from saccade.setting import Setting, expand

MODEL = AdaptiveViT(make_vit(depth=3, embed_dim=24, num_heads=2, img_size=64, num_classes=5))
IMAGES = make_images(MODEL.vit, 2)

ODD_NUMBERS = """
    0 -0 1 1.0 -1 1e-9 1e9 1e999 -1e999 0x10 1_000 0b1 nan inf 1j ٣ １６ 1e-400 True False None 08 10**9 2**9
    1..5 5..1 0..1000000000 0.1..0.9..0.1 1..2..0 1.. ..2 1...3 0..1e9 -5..5 1..5..-1 0..1..1e-9
    0..0.0000001..0.0000000000001 0..9999999999999999999999..1 0.30000000000000004
"""
ODD_WORDS = r"""
    'a' '' 'pretrained' '/etc/passwd' '|' '1..2' '\n' '\x00' '\ud800' b'x' f'{1}' 'entropy' 'cls' '"'
    x __import__ ... print(1) {} {1} a.b a[0] *a **a lambda:0 [x	for	x	in	y] {1:2} a:=1 not	1
"""
NUMBERS = st.one_of(
    st.integers(-3, 20).map(str),
    st.floats(-1.5, 1.5).map(lambda v: f"{v:.3g}"),
    st.sampled_from([*ODD_NUMBERS.split(), "9" * 30, "9" * 5000]),
)
WORDS = st.sampled_from([*ODD_WORDS.split(" "), "'" + "x" * 300 + "'"])
VALUES = st.recursive(
    NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=4).map(lambda v: f"({', '.join(v)})") | inner.map(lambda v: f"[{v}]"),
    max_leaves=6,
)
KNOWN = sorted(registry())
ODD_NAMES = "dense DENSE то𝗆e ｔome __class__ __init__ print None True a.b tome()() 1"
NAMES = st.sampled_from(KNOWN) | st.sampled_from(["", "tome ", *ODD_NAMES.split()])


@st.composite
def calls(draw: st.DrawFn) -> str:
    name = draw(NAMES)
    known = registry().get(name)
    knobs = sorted(known.knobs) if known is not None else []
    keys = st.sampled_from([*knobs, "keep", "r", "at", "seed", "self", "__class__", "fuse", "tokens", "scorer", "size"])
    args = draw(st.lists(VALUES, max_size=2))
    args += [f"{key}={value}" for key, value in draw(st.lists(st.tuples(keys, VALUES), max_size=3))]
    return f"{name}({', '.join(args)})" if args or draw(st.booleans()) else name


LINES = st.one_of(
    st.lists(calls(), min_size=1, max_size=4).map(" | ".join),
    st.lists(calls(), min_size=1, max_size=3).map("|".join).map(lambda v: v + "\n"),
    st.text(max_size=80),
    st.text("()[]{}|.,='\"\\0123456789eE+-_ tomevi\n\t\0#", max_size=60),
)


def faults(line: str) -> list[str]:
    """What is wrong with how a line is taken: empty where it is refused, or prints as itself and runs.

    Raises AssertionError where a refusal is not one line.
    """
    parsed = attempt(lambda: Setting.parse(line))
    listed = attempt(lambda: expand(line))
    attempt(lambda: expanded(MODEL, line))
    view = attempt(lambda: MODEL.at(line))
    wrong = {
        "prints as another": isinstance(parsed, Setting) and Setting.parse(str(parsed)) != parsed,
        "is a range of none, or of too many": isinstance(listed, list) and not 1 <= len(listed) <= 200,
        "cannot be read, and is a model": isinstance(view, AdaptiveViT) and isinstance(parsed, UserError),
    }
    if isinstance(view, AdaptiveViT):
        with torch.no_grad():
            ran = attempt(lambda: view.eval()(IMAGES))
        if not isinstance(ran, UserError):
            wrong["gives logits of another shape"] = ran.logits.shape != (2, 5)
            wrong["gives what is not finite"] = not torch.isfinite(ran.logits).all()
            wrong["has MACs below zero"] = bool((ran.trace.macs() < 0).any())
    return [f"{line[:200]!r} {fault}" for fault, there in wrong.items() if there]


@settings(max_examples=150)
@given(LINES)
def test_any_line(line):
    assert faults(line) == []


@pytest.mark.slow
@settings(max_examples=5000)
@given(LINES)
def test_any_line_at_length(line):
    assert faults(line) == []


HOSTILE = [
    "9", "1", "-1", "0", "1e308", "1e-308", "10**400", "'x'", "None", "True", "()", "((),)", "(1, (2, 3))",
    "(-1,)", "(1, 1)", "(0.5, 0.5, 0.5)", "9" * 40, "1" + "0" * 300, "'" + "y" * 200 + "'", "(9, 10**9)", "-1e999",
    "1e999", "-0.0", "2**63", str(2**63), str(2**31), "0.9999999999999999", "1e-17",
]  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_every_knob_of_every_method(name):
    """Each knob by each hostile value, by name and by place."""
    lines = [f"{name}({knob}{value})" for value in HOSTILE for knob in ("", *(f"{k}=" for k in registry()[name].knobs))]
    assert [fault for line in lines for fault in faults(line)] == []


LINES_FOUND = {
    "1e5 characters": "tome(r=" + "1" * 100_000 + ")",
    "1e5 bars": "|" * 100_000,
    "1e4 parts": " | ".join(["tome(r=1)"] * 10_000),
    "a range of 10^9": "tome(r=0..1000000000)",
    "ranges that multiply": "tome(r=0..900) | evit(0.001..0.999..0.001)",
    "ranges in every knob": "quadtree(1..999, 1..999, 1..999)",
    "300 brackets": "tome(r=" + "(" * 300 + ")" * 300 + ")",
    "400 brackets in words": "tome(r=" + "[" * 400,
    "300 minus signs": "tome(r=" + "-" * 300 + "1)",
    "digits of another script": "tome(r=٣)",
    "fullwidth letters": "ｔｏｍｅ(r=1)",
    "a soft hyphen": "to\u00adme(r=1)",
    "a zero byte": "tome(r=1)\0",
    "a comment": "tome(r=1) # | evit(0.5)",
    "lines": "tome(\nr=1\n)",
    "a semicolon": "tome(r=1); evit(0.5)",
    "a star": "tome(*(1,))",
    "two stars": "tome(**{'r': 1})",
    "a walrus": "tome(r := 1)",
    "an attribute": "tome.__class__(1)",
    "a name of the class": "__class__",
    "an empty part": "tome(r=1) | | evit(0.5)",
    "a part at the end": "tome(r=1) |",
    "dense in the middle": "tome(r=1) | dense | evit(0.5)",
    "two tokenizers": "grid(16) | grid(32)",
    "a tokenizer behind": "tome(r=1) | grid(32)",
    "a lone surrogate": "tome(r='\ud800')",
}


@pytest.mark.parametrize("what", LINES_FOUND)
def test_lines(what):
    assert faults(LINES_FOUND[what]) == []
