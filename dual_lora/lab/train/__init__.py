"""One training run: the Trainer, its callbacks and checkpoints, and the plan of what a run would take."""
