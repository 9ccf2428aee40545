"""Measures the CUDA convolution's tiles by shape and writes the table that the library is built with."""
