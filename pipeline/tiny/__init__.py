"""The offline "tiny" task: a synthetic instruction world, its hidden gold preference, a simulated labeler and a base model."""
