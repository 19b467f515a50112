"""Tables of speed, one script each; run from the checkout: `python -m benchmarks.NAME --help`."""
