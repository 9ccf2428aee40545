"""What a sampling loop runs on: a state, its evaluations, and the open graphs of a bundle."""
