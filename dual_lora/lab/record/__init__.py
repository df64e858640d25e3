"""What is kept of a run: its identity, its folder, where its numbers come from, and the copy in W&B."""
