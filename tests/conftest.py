"""No test reaches an account of whoever runs it; those of the mirror say otherwise themselves."""

import os

os.environ["WANDB_MODE"] = "disabled"
