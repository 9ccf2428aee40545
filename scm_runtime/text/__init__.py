"""Prompts: from text to token ids, and with the text graph of a bundle to the conditioning of its step graph."""
