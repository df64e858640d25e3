"""The machine: files, locks, signals, processes, memory, and libraries that are slow to import."""
