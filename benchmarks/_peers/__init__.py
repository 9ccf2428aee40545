"""Shared by peers.py and teacher.py: models, peers, and the processes that run them."""
