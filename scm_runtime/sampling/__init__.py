"""The sampling loop, from noise to samples, for single calls and for batched requests."""
