"""Figures of a report: the same records give the same bytes."""
