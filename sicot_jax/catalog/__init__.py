"""Catalogues of photos, SKUs and titles: interface, sampling and host batches; never imports jax."""
