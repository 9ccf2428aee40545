"""``scm-runtime bench``: a bundle's latency, throughput and memory on this machine, and its share of the machine's peak."""
