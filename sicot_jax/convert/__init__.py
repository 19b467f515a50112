"""Weights in and out: PyTorch, ONNX, StableHLO. Only this package may import torch, and only when it converts."""
