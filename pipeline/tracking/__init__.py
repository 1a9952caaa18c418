"""metrics.jsonl first, Weights & Biases second."""
