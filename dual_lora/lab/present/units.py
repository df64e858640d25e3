"""Units of printed amounts."""

GB, MB = 1e9, 1e6  # bytes
