"""What was measured of each run's weights, as parts of a report."""
