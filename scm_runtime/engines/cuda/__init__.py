"""The engine on a CUDA device: memory, captured graphs, and the thread that all of a context's work is done in."""
