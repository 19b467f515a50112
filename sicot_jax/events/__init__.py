"""What visitors saw and did, and what can be learned from it."""
