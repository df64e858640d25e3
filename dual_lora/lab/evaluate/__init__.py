"""Outputs of a model on a task, runs that are evaluated again, and exported checkpoints."""
