"""Text from data and messages in reports: it is shown as it is and never becomes markup."""

from html.parser import HTMLParser
from pathlib import Path

import pandas as pd

from dual_lora.lab.present.document import Image, Table, Text, escape_markdown, render_html, render_markdown

HOSTILE = "<img src=x onerror=alert(1)></td>&lt;b|c\nd"
PIXEL = bytes.fromhex("89504e470d0a1a0a")


def build_blocks(folder: Path) -> list:
    """Return one block of every kind, each with the hostile text in all of its parts."""
    (folder / "figure.png").write_bytes(PIXEL)
    cells = pd.DataFrame([[HOSTILE, "1.0"], ["x", "< 0.001"]], columns=[HOSTILE, "p"])
    bold = pd.DataFrame([[True, False], [False, False]], columns=cells.columns)
    texts = [Text(HOSTILE), Text(HOSTILE, heading=True), Text(items=(HOSTILE,))]
    return [*texts, Table(cells, HOSTILE, bold), Image(folder / "figure.png", HOSTILE)]


def test_markdown_passes_no_html_on(tmp_path):
    text = render_markdown(build_blocks(tmp_path))
    assert "<img" not in text and "</td" not in text and "&amp;lt;b" in text
    assert text.count("&lt;img src=x") == 7
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and all(line.replace(r"\|", "").count("|") == 3 for line in rows)
    assert "| < 0.001 |" in text.replace("   ", " ").replace("  ", " ")


def test_what_is_no_markup_stays():
    assert escape_markdown("p < 0.001, a<0, b & c, R&D, x > y") == "p < 0.001, a<0, b & c, R&D, x > y"


def test_the_page_has_only_its_own_elements(tmp_path):
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, dict(attrs)))

    page = render_html(build_blocks(tmp_path), HOSTILE)
    Reader().feed(page)
    assert [attrs for tag, attrs in found if tag == "img"] == [{"alt": HOSTILE, "src": found[-2][1]["src"]}]
    assert not any("onerror" in attrs for _, attrs in found)
