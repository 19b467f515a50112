"""Torch-named weights: files, names, batch-norm folding, parity checks."""
