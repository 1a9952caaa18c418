"""Several processes that train together: how they start, who has which rows, where the weights are whole.

The engines are others': accelerate's DDP and FSDP2, chosen by a file of configs/engines.
"""
