"""ONNX Runtime's sessions: their options, the library of native kernels, and running them."""
