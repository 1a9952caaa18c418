"""Several processes that train together: how they start, who has which rows, where the weights are whole.

The engines are others': accelerate's DDP, FSDP2 and DeepSpeed, chosen by a file of configs/engines.
"""
