"""Visual search around the recogniser."""
