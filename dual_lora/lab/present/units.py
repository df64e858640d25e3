"""Units in which numbers are given and printed. Imports nothing, because commands start with it."""

GB, MB = 1e9, 1e6  # bytes
