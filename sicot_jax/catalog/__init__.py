"""Catalogues: photos, SKUs and titles, imported, generated or exported; never imports jax."""
