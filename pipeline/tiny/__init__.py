"""The offline "tiny" task: a synthetic world, its hidden gold, a simulated labeler, a base model."""
