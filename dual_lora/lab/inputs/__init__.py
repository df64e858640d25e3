"""What a run reads: model files and their hashes, GGUF headers, the hub, and splits of the data."""
