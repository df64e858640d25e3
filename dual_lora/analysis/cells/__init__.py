"""A study of many small cells: one JSON line per finished cell, so that a stopped study resumes where it stopped.

A study is a module with `plan_cells(size, ...)`, `run_cell(cell)` and `write_report(rows, folder)`. A cell is a frozen
dataclass of plain values; the same cell gives the same result, bit for bit, on the same machine and number of threads.
"""
