"""Shared by all other packages: files, the process, runs in flight, logging, and the import of ONNX Runtime."""
