"""The harness: settings, models, methods, training, evaluation and run records. Not part of the installed package."""
