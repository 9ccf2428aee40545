"""Optimised graphs on disk, so that opening a bundle again skips their optimisation."""
