"""Engines, which evaluate a bundle's graphs on a device, and the opening of a bundle."""
