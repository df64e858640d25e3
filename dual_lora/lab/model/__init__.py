"""Base models, the methods that adapt them, and the encoding of rows as model inputs."""
