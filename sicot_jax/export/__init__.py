"""Conversion of finished runs to PyTorch, ONNX and StableHLO, and of PyTorch weights to a start."""
