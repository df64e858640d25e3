"""A report as blocks of text, tables and figures, written as Markdown, LaTeX (booktabs) and one HTML page."""

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd

STYLE = """body {font: 15px/1.5 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em}
table {border-collapse: collapse; margin: 1em 0} th, td {padding: .2em .8em; text-align: right}
tr {border-top: 1px solid #ddd}
td {white-space: nowrap} td:first-child, th:first-child {text-align: left} img {max-width: 100%}
tr.aside td {color: #666; font-size: 90%} p, li {max-width: 60em}"""
TEX = {"±": r"$\pm$", "–": "--", "†": r"\dag{}", "‡": r"\ddag{}", "≥": r"$\geq$"}


@dataclass(frozen=True)
class Text:
    """A paragraph; `heading` makes it a heading, several `items` a list."""

    text: str = ""
    heading: bool = False
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of printed cells. bold: cells to set off, of its shape; aside: positions of rows that are not ours."""

    cells: pd.DataFrame
    caption: str
    bold: pd.DataFrame | None = None
    aside: frozenset[int] = frozenset()

    def styled(self, before: str, after: str) -> pd.DataFrame:
        """Return the cells with the bold ones between two marks."""
        if self.bold is None:
            return self.cells
        return self.cells.where(~self.bold, before + self.cells.astype(str) + after)


@dataclass(frozen=True)
class Image:
    """A figure in a PNG file, with its words."""

    path: Path
    caption: str


Block = Text | Table | Image


def markdown(blocks: list[Block]) -> str:
    return "\n\n".join(map(markdown_block, blocks)) + "\n"


def markdown_block(block: Block) -> str:
    if isinstance(block, Image):
        return f"![{block.caption}]({block.path.name})"
    if isinstance(block, Table):
        cells = block.styled("**", "**").map(lambda cell: str(cell).replace("|", r"\|"))
        return f"{block.caption}\n\n{cells.to_markdown(index=False, disable_numparse=True)}"
    if block.items:
        return "\n".join(f"- {item}" for item in block.items)
    return f"## {block.text}" if block.heading else block.text


def latex(blocks: list[Block]) -> str:
    """Return the tables for \\input: needs \\usepackage{booktabs}."""
    return "\n".join(latex_table(block) for block in blocks if isinstance(block, Table))


def latex_table(table: Table) -> str:
    cells = table.cells.rename(columns=tex).map(tex)
    if table.bold is not None:
        bold = table.bold.set_axis(cells.columns, axis=1)
        cells = cells.where(~bold, r"\textbf{" + cells + "}")
    shape = "l" + "r" * (cells.shape[1] - 1)
    return cells.style.hide(axis="index").to_latex(
        hrules=True, column_format=shape, caption=tex(table.caption), position_float="centering"
    )


def tex(cell: object) -> str:
    """Return text with what LaTeX reads as commands escaped."""
    text = str(cell).replace("\\", r"\textbackslash{}")
    for sign in "&%$#_{}":
        text = text if sign in "{}" else text.replace(sign, "\\" + sign)
    for sign, command in TEX.items():
        text = text.replace(sign, command)
    return text.replace("^", r"\^{}").replace("~", r"\~{}")


def html(blocks: list[Block], title: str) -> str:
    """Return a page that needs nothing but itself: figures are inside it."""
    body = "\n".join(map(html_block, blocks))
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    page = f"<head>{head}</head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body>"
    return f'<!DOCTYPE html>\n<html lang="en">{page}</html>\n'


def html_block(block: Block) -> str:
    if isinstance(block, Image):
        data, words = base64.b64encode(block.path.read_bytes()).decode(), escape(block.caption)
        return f'<p><img alt="{words}" src="data:image/png;base64,{data}"><br>{words}</p>'
    if isinstance(block, Table):
        return html_table(block)
    if block.items:
        return "<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in block.items) + "\n</ul>"
    return f"<h2>{escape(block.text)}</h2>" if block.heading else f"<p>{escape(block.text)}</p>"


def html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(str(name))}</th>" for name in table.cells)
    lines = []
    for number, row in enumerate(table.cells.itertuples(index=False)):
        bold = [False] * len(row) if table.bold is None else list(table.bold.iloc[number])
        cells = (f"<b>{escape(str(c))}</b>" if b else escape(str(c)) for c, b in zip(row, bold, strict=True))
        kind = ' class="aside"' if number in table.aside else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<p>{escape(table.caption)}</p>\n<table>\n<tr>{head}</tr>\n" + "\n".join(lines) + "\n</table>"
