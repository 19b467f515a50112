"""Training, checkpoints, evaluation and the run folder."""
