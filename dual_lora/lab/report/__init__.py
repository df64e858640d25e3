"""Reports of experiments, from run records alone."""
