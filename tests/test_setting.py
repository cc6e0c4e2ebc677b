"""Settings: what is printed is read back, what is malformed is refused with its own text, and nothing is ever run."""

from __future__ import annotations

import builtins
import keyword
import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracles import make_vit
from saccade.backbones.plan_builder import build
from saccade.backbones.vit import backbone_of
from saccade.core.registry import list_methods, registry
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.setting import LONGEST, MOST, MOST_SETTINGS, Call, Setting, expand, presets
from saccade.terminal.listing import list_methods as listed

names = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=8).filter(
    lambda name: name.isidentifier() and not keyword.iskeyword(name) and name != "dense"
)
plain = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(plain | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=5)
calls = st.builds(
    Call,
    names,
    st.lists(values, max_size=2).map(tuple),
    st.dictionaries(names, values, max_size=2).map(lambda knobs: tuple(knobs.items())),
)
settings = st.lists(calls, max_size=3).map(lambda parts: Setting(tuple(parts))).filter(lambda s: len(str(s)) <= LONGEST)


@given(settings)
def test_what_is_printed_is_read_back(setting):
    assert Setting.parse(str(setting)) == setting
    assert str(Setting.parse(str(setting))) == str(setting)
    assert hash(Setting.parse(str(setting))) == hash(setting)


@given(settings, st.sampled_from([" ", "  ", ""]))
def test_space_around_the_bars_does_not_matter(setting, space):
    text = f"{space}|{space}".join(map(str, setting.calls))
    assert Setting.parse(space + text + space) == setting


@given(st.text(max_size=60) | st.text("tome()|=,.'\"[]{}*0-9 rev", max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        setting = Setting.parse(text)
    except UserError as error:
        assert str(error)
    else:
        assert Setting.parse(str(setting)) == setting


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("", "dense"),
        ("dense", "dense"),
        ("  ", "dense"),
        ("tome", "tome()"),
        ("tome()", "tome()"),
        ("tome(13)", "tome(13)"),
        ("tome( r = 8 )", "tome(r=8)"),
        ("tome(r=[3, 2])", "tome(r=(3, 2))"),
        ("tome(r=8, inflection=-1)", "tome(r=8, inflection=-1)"),
        ("grid(32)|evit(.7,fuse=True)", "grid(32) | evit(0.7, fuse=True)"),
        ("evit(score='received')", "evit(score='received')"),
        ('evit(score="received")', "evit(score='received')"),
        ("a | b | c", "a() | b() | c()"),
        ("a | (b | c)", None),
    ],
)
def test_examples(text, printed):
    if printed is None:
        with pytest.raises(UserError):
            Setting.parse(text)
    else:
        assert str(Setting.parse(text)) == printed


def test_a_setting_is_a_setting():
    setting = Setting.parse("tome(r=8)")
    assert Setting.parse(setting) is setting
    assert setting == Setting((Call("tome", (), (("r", 8),)),))


MALFORMED = [
    "tome(r=__import__('os'))",
    "__import__('os').system('true')",
    "os.system('true')",
    "tome(r=boom())",
    "tome(boom)",
    "tome(r=(lambda: boom())())",
    "lambda: boom()",
    "tome(r=[boom() for _ in (1, 2)])",
    "tome(r=boom.real)",
    "boom[0]",
    "boom.real",
    "(boom())()",
    "tome(r=f'{boom()}')",
    "tome(r=1 + 1)",
    "tome(r=2 ** 99)",
    "tome(r=not 1)",
    "tome(r={1: 2})",
    "tome(r={1, 2})",
    "tome(r=...)",
    "tome(r=b'8')",
    "tome(r=1j)",
    "tome(r=1e999)",
    "tome(*(1, 2))",
    "tome(**{'r': 1})",
    "tome(**None)",
    "tome(r=1, r=2)",
    "tome(r=1",
    "tome(r=)",
    "tome)",
    "tome(r:=1)",
    "|",
    "| tome",
    "tome |",
    "tome || evit",
    "tome & evit",
    "tome, evit",
    "tome; evit",
    "tome\nevit",
    "tome if 1 else evit",
    "tome = 1",
    "import os",
    "42",
    "'tome'",
    "-tome",
    "[tome]",
    "await tome",
    "tome((yield))",
    "tome(r=\x00)",
    "None",
    "(" * 400 + ")" * 400,
    "(" * 150 + "tome" + ")" * 150 + "." + "a",
    "tome(r=" + "[" * 300 + "]" * 300 + ")",
    "tome(r=" + "-" * 900 + "1)",
    "~" * 900 + "tome",
    "tome" + ".a" * 450,
    "tome" + "()" * 450,
    "1" + "+1" * 450,
    "tome(r=1" + "+1" * 400 + ")",
    "tome(r='" + "a" * LONGEST + "')",
    "tome | " * 200,
]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: repr(text[:30]))
def test_malformed_text_is_refused_and_not_run(text, monkeypatch):
    monkeypatch.setattr(builtins, "boom", lambda: pytest.fail("the text was run"), raising=False)
    with pytest.raises(UserError) as refused:
        Setting.parse(text)
    assert str(refused.value) and "\n" not in str(refused.value)


def test_names_are_looked_up_in_the_registry_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(builtins, "boom", lambda *_: pytest.fail("the text was run"), raising=False)
    for text in ("boom()", "boom", "print(1)", "exec('boom()')", "Setting()", "tome.__call__"):
        with pytest.raises(UserError):
            AdaptiveViT(make_vit(), text)


def test_many_parts_are_read():
    assert len(Setting.parse(" | ".join(["tome(1)"] * 90)).calls) == 90


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("tomee", "tome"),
        ("Tome(r=8)", "tome"),
        ("evt(0.7)", "evit"),
        ("imagepeice", "imagepiece"),
        ("gird(32)", "grid"),
        ("evit(kep=0.5)", "keep"),
        ("evit(0.5, fused=True)", "fuse"),
        ("tome(inflexion=1)", "inflection"),
        ("grid(patch_size=8)", "patch"),
        ("imagepiece(merge_layers=[1])", "merge_at"),
    ],
)
def test_a_misspelling_names_the_nearest(text, meant):
    with pytest.raises(UserError, match=rf"did you mean '{meant}'\?"):
        AdaptiveViT(make_vit(), text)


def test_what_is_nothing_like_a_name_lists_the_names():
    with pytest.raises(UserError) as refused:
        AdaptiveViT(make_vit(), "zzzzzzzz")
    assert all(name in str(refused.value) for name in list_methods())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("grid(16) | grid(32)", "takes one tokenizer"),
        ("tome | grid(32)", r"the tokenizer comes first: write 'grid\(32\) \| tome\(\)'"),
        ("evit(0.5) | tome(r=1) | grid(32)", r"write 'grid\(32\) \| evit\(0.5\) \| tome\(r=1\)'"),
        ("random(seed=-1)", r"seed=-1 "),
        ("random(seed=2147483648)", r"seed=2147483648 .*2\*\*31"),
        ("random(seed=1.5)", r"seed=1.5"),
        ("random(0)", r"keep=0 .*\[0.001, 1\]"),
        ("random(2)", r"keep=2 .*\[0.001, 1\]"),
        ("random(at=[4])", r"block 4 is not one of 0 … 2"),
    ],
)
def test_mistakes_that_only_show_when_built(text, says):
    with pytest.raises(UserError, match=says):
        AdaptiveViT(make_vit(), text)


# --- ranges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "listed"),
    [
        ("tome(r=2..5)", ["tome(r=2)", "tome(r=3)", "tome(r=4)", "tome(r=5)"]),
        ("tome(r=2..8..2)", ["tome(r=2)", "tome(r=4)", "tome(r=6)", "tome(r=8)"]),
        ("tome(r=2..7..2)", ["tome(r=2)", "tome(r=4)", "tome(r=6)"]),
        ("tome(3..1)", ["tome(3)", "tome(2)", "tome(1)"]),
        ("tome(3..3)", ["tome(3)"]),
        ("tome(inflection=-1..1)", ["tome(inflection=-1)", "tome(inflection=0)", "tome(inflection=1)"]),
        ("evit(0.3..0.9..0.1)", [f"evit({k / 10})" for k in range(3, 10)]),
        ("evit(0.9..0.85..0.05)", ["evit(0.9)", "evit(0.85)"]),
        ("evit(1..2..0.5)", ["evit(1.0)", "evit(1.5)", "evit(2.0)"]),
        ("evit(at=[1..2, 3])", ["evit(at=(1, 3))", "evit(at=(2, 3))"]),
        ("a(1..2, b=3..4)", ["a(1, b=3)", "a(1, b=4)", "a(2, b=3)", "a(2, b=4)"]),
        ("a(1..2)|b | c(x=5..6)", [f"a({i}) | b() | c(x={k})" for i in (1, 2) for k in (5, 6)]),
        ("a('1..9', 1..2)", ["a('1..9', 1)", "a('1..9', 2)"]),
        ("a('x | 1..2') | b(1..2)", ["a('x | 1..2') | b(1)", "a('x | 1..2') | b(2)"]),
        ("evit( .5 )", ["evit( .5 )"]),  # nothing to expand: as it was written
        ("dense", ["dense"]),
        ("", [""]),
        ("tome(r=", ["tome(r="]),
    ],
)
def test_ranges_are_listed_in_order(text, listed):
    assert expand(text) == listed


@given(st.integers(-40, 40), st.integers(-40, 40), st.integers(1, 9))
def test_a_range_of_whole_numbers_is_pythons_with_its_end(first, last, step):
    found = [Setting.parse(s).calls[0].args[0] for s in expand(f"a({first}..{last}..{step})")]
    away = 1 if last >= first else -1
    assert found == list(range(first, last + away, away * step))


@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 99))
def test_a_range_of_decimals_has_no_rounding(first, last, step):
    found = [
        Setting.parse(s).calls[0].args[0] for s in expand(f"a({first / 100:.2f}..{last / 100:.2f}..{step / 100:.2f})")
    ]
    away = 1 if last >= first else -1
    assert found == [float(f"{k / 100:.2f}") for k in range(first, last + away, away * step)]


@given(settings)
def test_a_setting_without_ranges_stands_for_itself(setting):
    assert expand(str(setting)) == [str(setting)]


def test_only_what_is_sensible_is_listed_and_only_ranges_are_asked_about():
    asked = []

    def sensible(call: Call) -> bool:
        asked.append(call)
        return call.args[0] % 2 == 0

    assert expand("b(3) | a(1..6) | c(5)", sensible) == [f"b(3) | a({k}) | c(5)" for k in (2, 4, 6)]
    assert {call.name for call in asked} == {"a"} and len(asked) == 6
    with pytest.raises(UserError, match=r"no value in the range of 'a\(3\.\.3\)' makes sense here; name one: a\(3\)"):
        expand("a(3..3)", sensible)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("evit(0.3..0.9)", r"'0.3..0.9' needs a step: write it like 0.3..0.9..0.1"),
        ("a(1..9..0)", "step of 0"),
        ("a(1..9..-2)", "the ends tell the direction"),
        (f"a(0..{MOST})", f"{MOST + 1} values, over the limit of {MOST}"),
        ("a(1..99999999999999999999999)", "over the limit"),
        ("a(1..100, 1..100)", f"hold 10000 values, over the limit of {MOST}"),
        (f"a(1..20) | b(1..{MOST_SETTINGS // 20 + 1})", f"settings, over the limit of {MOST_SETTINGS}"),
        ("a(1..3", "cannot read the setting"),
        ("a(boom(1..3))", "must be plain numbers"),
        ("a(1...3)", "cannot read|plain numbers|write it like"),
        ("a(1..2..3..4)", "cannot read"),
        ("x" * LONGEST + "(1..3)", f"over the limit of {LONGEST}"),
    ],
)  # fmt: skip
def test_ranges_that_make_no_sense_are_refused(text, says):
    with pytest.raises(UserError, match=says) as refused:
        Setting.parse(expand(text)[0])
    assert "\n" not in str(refused.value)


@given(st.text("ab()|=,.'\"[]0-9 ", max_size=40))
def test_any_text_is_expanded_or_refused(text):
    try:
        found = expand(text)
    except UserError as error:
        assert str(error)
    else:
        assert found == [text] or all(str(Setting.parse(s)) == s for s in found)


def test_where_one_setting_is_needed_a_range_is_named():
    with pytest.raises(UserError, match="a range stands for several settings and one is needed here"):
        AdaptiveViT(make_vit(), "tome(r=1..3)")


# --- the registry ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_methods())
class TestEntry:
    def test_has_a_summary_and_says_what_its_knobs_do(self, name):
        entry = registry()[name]
        assert entry.summary.endswith(".") and entry.name == name and entry.kind in ("method", "tokenizer")
        assert all(f"{knob}:" in entry.build.__doc__ for knob in entry.knobs)
        assert all(knob.default is not knob.empty for knob in entry.knobs.values()), "a name alone is a setting"

    def test_builds_without_knobs_and_with_its_defaults(self, name):
        vit = make_vit()
        AdaptiveViT(vit, name)
        defaults = {knob: parameter.default for knob, parameter in registry()[name].knobs.items()}
        AdaptiveViT(vit, str(Setting((Call(name, (), tuple(defaults.items())),))))

    @pytest.mark.parametrize("family", ["vit", "siglip", "registers-average", "distilled"])
    def test_its_menu_is_made_of_settings_that_build(self, name, family):
        vit = make_vit(family)
        model = AdaptiveViT(vit)
        for text in registry()[name].menu(model.backbone):
            setting = model.at(text).setting
            assert str(setting) == text and setting.calls[0].name == name

    def test_says_of_every_step_of_a_range_whether_to_stop(self, name):
        entry, backbone = registry()[name], AdaptiveViT(make_vit()).backbone
        for value in (1, 16, 0.5, "a", None, (1, 2), ()):
            for knob in entry.knobs:
                try:
                    assert entry.accepts(backbone, (), {knob: value}) in (True, False)
                except UserError as error:
                    assert name in str(error)
        assert entry.accepts(backbone, (), {"zzz": 1})  # for building to refuse

    def test_refuses_unknown_knobs_and_too_many(self, name):
        with pytest.raises(UserError, match=f"^{name} has no knob 'zzz'"):
            AdaptiveViT(make_vit(), f"{name}(zzz=1)")
        with pytest.raises(UserError, match=f"^{name}: too many positional arguments"):
            AdaptiveViT(make_vit(), f"{name}({', '.join(['1'] * 30)})")

    @pytest.mark.parametrize(
        "value", [None, True, "'a'", -1, -0.5, 1e30, 10**300, (), ((),), "('a', 'b')", [[1]]], ids=str
    )
    def test_a_value_of_any_kind_is_used_or_refused(self, name, value):
        """Never another exception than UserError, and nothing that fails only when images come."""
        vit = make_vit(depth=4)
        for knob in registry()[name].knobs:
            text = f"{name}({knob}={value})"
            try:
                model = AdaptiveViT(vit, text)
            except UserError as error:
                assert str(error).startswith(name) or "knob" in str(error), text
            else:
                with torch.no_grad():
                    assert model(torch.randn(1, 3, 64, 64)).logits.isfinite().all(), text


@pytest.mark.parametrize("name", sorted(presets()))
def test_a_published_system_is_a_setting_by_name(name):
    """It is written out when it is read, is no method's name, and can be built and listed; no weights are fetched."""
    written = Setting.parse(presets()[name].setting)
    assert Setting.parse(f"{name}()") == Setting.parse(name) == written and str(written) != "dense"
    assert Setting.parse(f"{name}() | depth(2)").calls[:-1] == written.calls
    assert name not in registry()
    assert list(listed(name)) == [str(call) for call in written.calls]
    offline = str(written).replace("'feature'", "\"feature(weights='random')\"")
    build(backbone_of(make_vit("deit", img_size=224)), Setting.parse(offline))
    with pytest.raises(UserError, match=f"{name}.. takes no knobs"):
        Setting.parse(f"{name}(0.5)")


def test_a_near_miss_of_a_published_system_is_named():
    with pytest.raises(UserError, match="did you mean 'quadformer'"):
        AdaptiveViT(make_vit("deit"), "quadformers()")
    with pytest.raises(UserError, match="did you mean 'quadformer'"):
        listed("quadforme")


def test_what_is_too_long_once_it_is_written_out_is_refused():
    """A folder keeps a setting written out, and must be able to read it."""
    line = f"adavit([[0.5]]) | adavit('{'x' * 971}')"
    assert len(line) < 1000
    with pytest.raises(UserError, match=r"a setting of 1001 characters, written out, is over the limit of 1000"):
        Setting.parse(line)
