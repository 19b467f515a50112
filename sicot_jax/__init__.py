"""SICoT: long-tailed product recognition with co-trained titles, in JAX."""

__version__ = "0.1.0"
