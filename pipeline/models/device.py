"""Where models compute."""

import torch


def device() -> torch.device:
    """This process's accelerator, or the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
