"""Arguments of a call: their names and types, their validation, and the arrays that the graphs read."""
