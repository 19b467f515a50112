"""Comparisons of training variants: baseline, co-training, sweeps."""
