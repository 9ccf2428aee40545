"""The networks this project defines, with the papers' names and equation numbers."""
