"""ONNX graphs of a bundle: traced from PyTorch modules, or built node by node."""
