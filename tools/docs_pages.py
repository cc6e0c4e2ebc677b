"""Pages of the documentation that are made: of methods, notebooks, the reference, the changelog. Run by mkdocs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import saccade
from measured import measured, summary
from saccade.core.registry import SOURCES, Entry, registry
from saccade.setting import presets

ROOT = Path(__file__).parents[1]
PAPER = re.compile(r"(?<!/)\barXiv[: ](\d{4}\.\d{4,5})")
CODE = re.compile(r"`[^`]*`")
FLAG = re.compile(r"(?<=[ >])(--[a-z][a-z-]*)")
FENCE = "```"


def on_files(files: Files, config: Any) -> Files:
    """mkdocs' event: the files of the site, with those of the code."""
    pages = {"changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), "reference.md": reference()}
    pages |= {f"methods/{name}.md": page(entry) for name, entry in registry().items()}
    pages["methods/index.md"] = index()
    pages |= {f"examples/{file.stem}.md": example(file) for file in sorted((ROOT / "examples").glob("*.ipynb"))}
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_config(config: Any) -> Any:
    """mkdocs' event: the methods' pages in the navigation."""
    names = ["methods/index.md", *(f"methods/{name}.md" for name in registry())]
    config.nav = [{"Methods": names} if entry == {"Methods": "methods/"} else entry for entry in config.nav]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs' event: the text of a page, made or written, with bars in code as the site's Markdown has them.

    In a table GitHub wants a bar in code escaped. The site's Markdown shows the backslash, and needs none.
    """
    lines, fenced = [], False
    for line in markdown.splitlines(keepends=True):
        fenced ^= line.lstrip().startswith(FENCE)
        row = not fenced and line.startswith("|")
        lines.append(CODE.sub(lambda code: code[0].replace("\\|", "|"), line) if row else line)
    return "".join(lines)


def on_page_content(html: str, **_: Any) -> str:
    """mkdocs' event: options of commands are kept in one line, ``--quick`` without a break behind its dashes."""
    return FLAG.sub(r'<span class="flag">\1</span>', html)


def page(entry: Entry) -> str:
    """What a method is, its knobs with where their defaults are from, and the rest of what it says of itself."""
    text = linked(entry.build.__doc__ or "")
    head, _, rest = text.partition("Args:")
    _, _, after = rest.partition("\n\n") if rest else ("", "", "")
    rows = []
    for name, knob in entry.knobs.items():
        source = entry.source(name)
        rows.append(
            f"| `{name}` | `{knob.default!r}` | {source} | {cell(entry.help[name].removesuffix(f' [{source}]'))} |"
        )
    table = ["| knob | default | from | what it is |", "|---|---|---|---|", *rows] if rows else ["It has no knobs."]
    legend = "; ".join(f"*{name}*: {words}" for name, words in SOURCES.items())
    picture = ROOT / "docs" / "pictures" / "methods" / f"{entry.name}.jpg"
    shown = f"![The photo, and the tokens that {entry.name} leaves](../pictures/methods/{picture.name})"
    try_it = f"saccade view vit_tiny_patch16_224 photo.jpg --pretrained -s '{entry.name}()' --out photo.png"
    parts = [f"# {entry.name}", dedented(head), "## Knobs", "\n".join(table), legend, dedented(after)]
    parts += [measured(entry.name), engines(entry.name), "## See it", shown if picture.exists() else ""]
    parts += [f"```bash\n{try_it}\n```"]
    return "\n\n".join(filter(None, parts)) + "\n"


def engines(name: str) -> str:
    """The rows of docs/engines.md that a method has, or nothing."""
    lines = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8").splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| setting |"))
    end = lines.index("", head)  # photos have a table of their own
    rows = [line for line in lines[head:end] if line.startswith(f"| `{name}(")]
    note = "How far the logits are from PyTorch's; [what the numbers are](../engines.md)."
    return "\n".join(["## In engines", "", *lines[head : head + 2], *rows, "", note]) if rows else ""


def example(notebook: Path) -> str:
    """A notebook as a page: its prose, its code, and the pictures that ``tools/picture.py`` made of it."""
    parts = []
    for place, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        picture = ROOT / "docs" / "pictures" / "examples" / f"{notebook.stem}-{place}.jpg"
        if picture.exists():
            parts.append(f"![What the cell shows](../pictures/examples/{picture.name})")
    title, rest = parts[0].split("\n", 1) if "\n" in parts[0] else (parts[0], "")
    note = f"*A notebook: `examples/{notebook.name}`.*"
    return "\n\n".join([title, note, rest.strip(), *parts[1:]]) + "\n"


def index() -> str:
    """All names, and the published systems by name."""
    groups: dict[str, list[str]] = {"Tokenizers": [], "Methods that reduce": [], "Baselines": []}
    for name, entry in registry().items():
        group = "Tokenizers" if entry.kind == "tokenizer" else "Baselines" if entry.baseline else "Methods that reduce"
        row = f"| [{name}]({name}.md) | {cell(entry.summary)} | {summary(name) or 'has to be trained'} |"
        groups[group].append(row)
    head = ["| name | what it does | points, at how many times fewer MACs |", "|---|---|---|"]
    tables = [line for group, rows in groups.items() for line in (f"## {group}", "", *head, *rows, "")]
    systems = [
        f"| `{name}()` | `{cell(preset.setting)}` | {cell(preset.about)} |" for name, preset in presets().items()
    ]
    return "\n".join(
        [
            "# Methods",
            "",
            "A setting is built from these, joined by `|`; a tokenizer comes first. Points are top-1 against the dense",
            "model, where nothing is trained; each method's page has the intervals and says on which photos.",
            "",
            *tables,
            "## Published systems",
            "",
            "| name | setting | what it is |",
            "|---|---|---|",
            *systems,
            "",
        ]
    )


def reference() -> str:
    """The public names, by what the package exports."""
    known = [name for name in saccade.__all__ if name != "__version__"] + ["list", "eval"]
    places = {name: saccade._HOME[name].partition(":") for name in dict.fromkeys(known)}
    lines = [f"::: saccade.{module}.{attribute or name}\n" for name, (module, _, attribute) in sorted(places.items())]
    return "# Reference\n\n" + "\n".join(lines)


def linked(text: str) -> str:
    """Papers as links."""
    return PAPER.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def dedented(text: str) -> str:
    """A part of a docstring, without what all its lines begin with."""
    return re.sub(r"^ {4}", "", text.strip("\n"), flags=re.MULTILINE).strip()


def cell(text: str) -> str:
    """Text for a table."""
    return linked(text).replace("|", "\\|").replace("\n", " ")
