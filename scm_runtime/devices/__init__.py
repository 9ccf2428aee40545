"""Where graphs run: the selection of a device, the CPU, and the CUDA driver and libraries."""
