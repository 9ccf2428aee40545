"""The arguments of a call: their names and types, their checks, and the values that the graphs get."""
