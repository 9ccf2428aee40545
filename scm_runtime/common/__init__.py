"""What every other package may use: files, processes, runs in flight, the import of ONNX Runtime."""
