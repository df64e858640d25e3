"""Rows of published tables."""


def get_row(table, **keys):
    """Return the one row of a published table with these keys."""
    (row,) = table.select_rows(**keys)
    return row
