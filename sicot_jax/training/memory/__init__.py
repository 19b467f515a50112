"""Memory that a run needs, and settings that fit."""
