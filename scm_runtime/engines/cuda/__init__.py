"""The engine for CUDA devices: streams and device memory, captured CUDA graphs, and the thread that does all CUDA work."""
