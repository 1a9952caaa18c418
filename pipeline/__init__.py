"""What the three stages share: configuration, artifacts, data, models, PPO, evaluation."""

import logging
import os

# The libraries tell their makers of each trainer and each error, unless they are told not to
# before they are imported. What the user has set stays.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

# It remarks on its own import, which peft brings about, and on every product in 8 bits.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
