"""What figures.py writes: tables and plots."""
