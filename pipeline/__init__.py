"""What the three stages share: configuration, artifacts, data, models, PPO, evaluation."""

import logging
import os

# The libraries tell their makers of each trainer and each error, unless they are told not to
# before they are imported. What the user has set stays.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

# It remarks on its own import, which peft brings about, and on every product in 8 bits.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# A thread that is done with its share of a product spins for 10 ms before it sleeps, unless OpenMP is told
# otherwise before torch loads it. Beside other programs it so takes the core that the thread it waits for needs,
# at each product anew. This is libgomp's own count for more threads than cores, 35 us: it spans the gaps
# between products, and no sum depends on it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
