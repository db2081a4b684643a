"""Predictions as programs that run without this package: ONNX, and PyTorch's ``torch.export``."""
