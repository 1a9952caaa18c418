"""What the three stages share: configuration, artifacts, data, models, PPO, evaluation."""
