"""Tables on the console, which fit 80 columns and never break a word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table


def print_table(
    title: str, headers: Sequence[str], rows: Iterable[Sequence[str]], last: Sequence[str] | None = None
) -> None:
    """Print a table. The first column is kept on one line, and the cells of the others are broken at spaces.

    A table of words that are too long for the console is wider than it.

    Args:
        title: printed above.
        headers: of the columns. The first column is aligned to the left, the others to the right.
        rows: a text for each column.
        last: a row below a line, for totals.

    Example:
        >>> print_table("Experts", ("linear", "count"), [("up_proj", "30")])  # doctest: +NORMALIZE_WHITESPACE
        <BLANKLINE>
        Experts
        linear   count
        ───────────────
        up_proj     30
    """
    rows = [*rows, *([last] if last else [])]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for i, header in enumerate(headers):
        words = [word for cell in (header, *(row[i] for row in rows)) for word in cell.split()]
        table.add_column(
            header,
            justify="right" if i else "left",
            min_width=max(map(cell_len, words), default=0),
            no_wrap=i == 0,
            overflow="fold",
        )
    for row in rows:
        if row is last:
            table.add_section()
        table.add_row(*row)
    printer = console()
    printer.print(f"\n{title}", style="bold")
    printer.print(table, crop=False)


def console() -> Console:
    """The console, without markup, since texts and names may hold brackets."""
    return Console(highlight=False, markup=False)
