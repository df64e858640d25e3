"""What a command line takes from outside of this repository: settings files, models without one, and code."""
