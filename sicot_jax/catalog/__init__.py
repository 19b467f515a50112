"""Catalogues of photos, SKUs and titles, sampling and host batches; never imports jax."""
