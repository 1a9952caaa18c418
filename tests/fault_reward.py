"""Reward functions that go wrong."""

import torch


def nan(prompts, responses, rows):
    return [float("nan") if i == 1 else 0.0 for i in range(len(prompts))]


def inf(prompts, responses, rows):
    return [float("inf") if i == 1 else 0.0 for i in range(len(prompts))]


_calls = []


def hungry(prompts, responses, rows):
    """Fails in the first rollout, which comes after the first samples."""
    _calls.append(len(prompts))
    return torch.zeros(2**48 if len(_calls) > 1 else len(prompts)).tolist()
