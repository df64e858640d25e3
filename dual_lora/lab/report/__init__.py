"""Reports of experiments, from only the run records."""
