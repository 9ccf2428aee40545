"""Where graphs run: the choice of a device, and the CUDA driver and libraries that it needs."""
