"""Kinds of catalogue that can be opened: imported, one array file, generated."""
