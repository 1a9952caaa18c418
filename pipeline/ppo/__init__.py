"""PPO for language models, in the order a prompt takes: rollout, rewards, maths, update."""
