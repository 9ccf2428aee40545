"""Examines the installation and says what is missing."""
