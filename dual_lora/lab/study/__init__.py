"""Experiments: their runs, what is known of each, and how missing ones are executed."""
