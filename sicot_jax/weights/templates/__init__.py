"""Stand-alone PyTorch modules that are copied into an exported folder."""
