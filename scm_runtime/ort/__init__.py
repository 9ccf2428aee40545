"""Sessions of ONNX Runtime: their options, opening and running graphs, and the native library."""
