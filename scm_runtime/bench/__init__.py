"""Measures a bundle on this machine: latency, throughput, memory, and the share of the peak."""
