"""Diagnosis of the installation."""
