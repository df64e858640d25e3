"""Settings: their types, how a command line becomes them, and where files are. Loads neither torch nor transformers."""
