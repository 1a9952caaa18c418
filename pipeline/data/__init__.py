"""Rows in any common form -> demonstrations, prompts, rankings, texts; messages -> token ids.

Nothing here imports torch, transformers or (until a hub id is read) datasets.
"""
