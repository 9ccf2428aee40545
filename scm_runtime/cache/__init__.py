"""The cache of optimized graphs, with which a bundle opens faster the next time."""
