"""Shared by all other packages: files, the process, runs in flight, logging, reading of JSON and TOML, and the import of ONNX Runtime."""
