"""Catalogues of photos, SKUs and titles: the common interface, sampling and batches. Never imports
jax.
"""
