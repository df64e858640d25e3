"""What a run reads: model files and their hashes, config.json, GGUF headers, saved adapters, splits."""
