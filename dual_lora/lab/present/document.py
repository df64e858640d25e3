"""Blocks of text, tables and figures, rendered as Markdown, LaTeX and HTML."""

import base64
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd

MISSING = "–"
STYLE = """body {font: 15px/1.5 sans-serif; max-width: 96em; margin: 2em auto; padding: 0 1em}
table {border-collapse: collapse; margin: 1em 0} th, td {padding: .2em .8em; text-align: right; white-space: nowrap}
tr {border-top: 1px solid #ddd} .words {text-align: left} .wide {overflow-x: auto} img {max-width: 100%}
td[data-command] {cursor: copy}
tr.aside td {color: #666; font-size: 90%} p, li {max-width: 60em} p.figure {max-width: none}"""
# Copies the command of a cell that is clicked.
COPY = """<script>document.addEventListener("click", event => {
const cell = event.target.closest("[data-command]"); if (cell) navigator.clipboard.writeText(cell.dataset.command) })
</script>"""
# A cell of a column of numbers: one, perhaps with a spread or a unit, or a dash, or nothing.
NUMBER = re.compile(r"([-+<≥]|about )?\d.*|–.*|")
# The beginning of a tag, a comment or an entity; "< 0.001" is not one.
HTML_IN_MARKDOWN = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)")
# Makes a table as wide as the text if it is wider.
FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
TEX = {
    "±": r"$\pm$", "–": "--", "†": r"\dag{}", "‡": r"\ddag{}", "≥": r"$\geq$",
    "|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}", "\\": r"\textbackslash{}",
    "^": r"\^{}", "~": r"\~{}", **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A paragraph, a heading (`heading`), or a list (`items`)."""

    text: str = ""
    heading: bool = False
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of printed cells.

    Attributes:
        bold: which cells are bold, of the table's shape.
        aside: positions of published rows, set apart from ours.
        commands: what makes the runs of each cell, of the table's shape; empty where there is nothing to run. A page
            copies it on a click.
    """

    cells: pd.DataFrame
    caption: str
    bold: pd.DataFrame | None = None
    aside: frozenset[int] = frozenset()
    commands: pd.DataFrame | None = None

    def mark_bold(self, before: str, after: str) -> pd.DataFrame:
        """Return the cells, each bold one between two marks."""
        if self.bold is None:
            return self.cells
        return self.cells.where(~self.bold, before + self.cells.astype(str) + after)

    def find_word_columns(self) -> list[bool]:
        """Return which columns hold words. They are aligned to the left, numbers to the right."""
        columns = [self.cells.iloc[:, number].astype(str) for number in range(self.cells.shape[1])]
        return [not all(map(NUMBER.fullmatch, column)) for column in columns]


@dataclass(frozen=True)
class Image:
    """A figure in a PNG file, with its caption."""

    path: Path
    caption: str


Block = Text | Table | Image


def render_markdown(blocks: list[Block]) -> str:
    """Return the blocks as a page of Markdown."""
    return "\n\n".join(map(render_markdown_block, blocks)) + "\n"


def render_markdown_block(block: Block) -> str:
    """Return one block as Markdown."""
    if isinstance(block, Image):
        return f"![{escape_markdown(block.caption)}]({block.path.name})"
    if isinstance(block, Table):
        cells = block.mark_bold("**", "**").map(escape_markdown_cell).rename(columns=escape_markdown_cell)
        return f"{escape_markdown(block.caption)}\n\n{cells.to_markdown(index=False, disable_numparse=True)}"
    if block.items:
        return "\n".join(f"- {escape_markdown(item)}" for item in block.items)
    return escape_markdown(f"## {block.text}" if block.heading else block.text)


def escape_markdown(text: str) -> str:
    """Return text in which nothing is an HTML tag or entity. Names from data and messages may contain some, and
    Markdown passes them on."""
    return HTML_IN_MARKDOWN.sub(lambda found: escape(found[0]), text)


def escape_markdown_cell(cell: object) -> str:
    """Return a cell that stays one cell of a Markdown table."""
    return escape_markdown(str(cell).replace("|", r"\|").replace("\n", " "))


def render_latex(blocks: list[Block], name: str) -> str:
    """Return the tables for \\input, labelled tab:NAME-1 and so on; a list right after a table is its legend."""
    found = ["% needs booktabs and graphicx\n"]
    for block, after in zip(blocks, [*blocks[1:], Text()], strict=True):
        if isinstance(block, Table):
            legend = after.items if isinstance(after, Text) else ()
            found.append(render_latex_table(block, f"tab:{name}-{len(found)}", legend))
    return "\n".join(found)


def render_latex_table(table: Table, label: str, legend: tuple[str, ...] = ()) -> str:
    """Return a table with its legend, scaled down if it is wider than the page."""
    shape = "".join("l" if words else "r" for words in table.find_word_columns())
    text = (
        format_latex_cells(table)
        .style.hide(axis="index")
        .to_latex(
            hrules=True,
            column_format=shape,
            caption=escape_latex(table.caption),
            label=label,
            position_float="centering",
        )
    )
    begin, end = r"\begin{tabular}", r"\end{tabular}"
    text = text.replace(begin, f"{FIT}\n{begin}").replace(end, f"{end}}}")
    notes = "".join(f"{escape_latex(item)}\\par\n" for item in legend)
    return text.replace(r"\end{table}", "\\par\\raggedright\\footnotesize\n" * bool(notes) + notes + r"\end{table}")


def format_latex_cells(table: Table) -> pd.DataFrame:
    """Return the cells for LaTeX: published rows in italics, with a little space after them."""
    cells = table.cells.rename(columns=escape_latex).map(escape_latex)
    if table.bold is not None:
        cells = cells.where(~table.bold.set_axis(cells.columns, axis=1), r"\textbf{" + cells + "}")
    aside = pd.Series([number in table.aside for number in range(len(cells))], cells.index)
    cells = cells.where(~aside, r"\textit{" + cells + "}", axis=0)
    follows = aside.shift(fill_value=False) & ~aside
    cells.iloc[:, 0] = cells.iloc[:, 0].where(~follows, r"\addlinespace " + cells.iloc[:, 0])
    return cells


def escape_latex(cell: object) -> str:
    """Return text in which LaTeX's special characters are escaped."""
    return str(cell).translate(str.maketrans(TEX))


def render_html(blocks: list[Block], title: str) -> str:
    """Return a self-contained page, its figures embedded."""
    body = "\n".join(map(render_html_block, blocks))
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    page = (
        f"<head>{head}</head>\n<body><h1>{escape(title)}</h1>\n{body}\n{COPY if 'data-command' in body else ''}</body>"
    )
    return f'<!DOCTYPE html>\n<html lang="en">{page}</html>\n'


def render_html_block(block: Block) -> str:
    """Return one block as an element of a page; a figure is embedded."""
    if isinstance(block, Image):
        data, words = base64.b64encode(block.path.read_bytes()).decode(), escape(block.caption)
        return f'<p class="figure"><img alt="{words}" src="data:image/png;base64,{data}"><br>{words}</p>'
    if isinstance(block, Table):
        return render_html_table(block)
    if block.items:
        return "<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in block.items) + "\n</ul>"
    return f"<h2>{escape(block.text)}</h2>" if block.heading else f"<p>{escape(block.text)}</p>"


def render_html_table(table: Table) -> str:
    """Return a table whose cells copy their command on a click."""
    kinds = [' class="words"' if words else "" for words in table.find_word_columns()]
    head = "".join(f"<th{kind}>{escape(str(name))}</th>" for name, kind in zip(table.cells, kinds, strict=True))
    lines = []
    for number, row in enumerate(table.cells.itertuples(index=False)):
        bold = [False] * len(row) if table.bold is None else list(table.bold.iloc[number])
        cells = (f"<b>{escape(str(c))}</b>" if b else escape(str(c)) for c, b in zip(row, bold, strict=True))
        aside = ' class="aside"' if number in table.aside else ""
        commands = [""] * len(row) if table.commands is None else list(table.commands.iloc[number])
        hints = [f' title="click to copy: {escape(c)}" data-command="{escape(c)}"' if c else "" for c in commands]
        filled = "".join(f"<td{kind}{hint}>{cell}</td>" for cell, kind, hint in zip(cells, kinds, hints, strict=True))
        lines.append(f"<tr{aside}>{filled}</tr>")
    body = "\n".join([f"<tr>{head}</tr>", *lines])
    return f'<p>{escape(table.caption)}</p>\n<div class="wide"><table>\n{body}\n</table></div>'
