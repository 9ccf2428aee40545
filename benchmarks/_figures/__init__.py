"""Tables and plots that figures.py writes."""
