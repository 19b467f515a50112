"""Helpers without jax that every package may use: files, locks, text, arrays, images."""
