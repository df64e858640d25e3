"""Units in which numbers are given and printed. Imports nothing, because commands start with it."""

GB = 1e9  # bytes
