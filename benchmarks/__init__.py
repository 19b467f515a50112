"""Measures speed, memory and accuracy, one script each: `python -m benchmarks.NAME --help`."""
