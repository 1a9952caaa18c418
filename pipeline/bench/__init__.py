"""Our stages timed against TRL's, on equal work: `python -m pipeline.bench` (make bench)."""
