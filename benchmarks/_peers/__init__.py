"""What peers.py and teacher.py run: models, candidates, and the processes that hold them. Each file says what it is for."""
