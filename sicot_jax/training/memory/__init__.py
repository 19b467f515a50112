"""Estimates memory before a run and lists settings that fit."""
