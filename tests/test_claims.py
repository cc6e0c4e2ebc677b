"""``docs/claims.md`` says nothing that the pages of results do not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
ROWS = [line for line in (DOCS / "claims.md").read_text().splitlines() if line.startswith("|") and line.count("|") == 6]
CLAIMS = [[cell.strip() for cell in row.split("|")[1:-1]] for row in ROWS if not re.match(r"\| (claim|---)|\|---", row)]


def plain(text: str) -> str:
    return text.replace("−", "-")


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if "[" in claim[2]], ids=lambda claim: claim[0][:60])
def test_a_measured_claim_stands_on_a_page_of_results(claim):
    """Number, interval and verdict side by side; or number and interval alone, where prose gives the verdict."""
    _, measured, interval, verdict, _ = claim
    pages = plain("".join(page.read_text() for page in DOCS.glob("results*.md")))
    number = re.escape(plain(measured.split()[-1]) + " " + plain(interval))
    said = re.search(rf"\| {number} \| (holds|does not hold|not decided)", pages)
    assert re.search(number, pages)
    if said and not measured.startswith("EViT"):
        assert said[1] == verdict


def test_the_others_are_said_not_to_be_measured_or_have_no_interval():
    others = [claim for claim in CLAIMS if "[" not in claim[2]]
    assert len(CLAIMS) >= 60 and all(claim[1] == "not measured" or claim[3] for claim in others)


def test_the_summary_counts_the_rows_below():
    text = (DOCS / "claims.md").read_text()
    summary = {row.split(" | ")[0].strip("| "): row for row in text.splitlines() if re.match(r"\| \w+ \| \d+ \|", row)}
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(summary) == len(sections)
    for section in sections:
        paper = section.split(" (")[0]
        rows = [[c.strip() for c in row.split("|")[1:-1]] for row in section.splitlines() if row.count("|") == 6]
        said = ["not measured" if row[1] == "not measured" else row[3] for row in rows]
        counts = [said.count(word) for word in ("holds", "does not hold", "not decided", "not measured")]
        assert [int(n) for n in re.findall(r"\d+", summary[paper])] == counts, paper
