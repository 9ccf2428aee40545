"""Verification of a bundle: its samples on ONNX Runtime, compared with those of the original model in PyTorch."""
