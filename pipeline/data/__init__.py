"""Rows in any common form -> demonstrations, prompts, rankings, texts; messages -> token ids.

Nothing here imports torch, transformers or (until a hub id is read) datasets.
"""

from pipeline.data.forms import (
    Demonstration,
    Prompt,
    load_demonstrations,
    load_prompts,
    load_texts,
)
from pipeline.data.messages import Message
from pipeline.data.rankings import Ranking, load_rankings
from pipeline.data.readers import Row
from pipeline.data.sources import read_rows, rows_from_memory
from pipeline.data.splits import split_by_prompt
from pipeline.data.template import (
    encode_demonstration,
    encode_prompt,
    encode_responses,
    prepare_tokenizer,
    template_hash,
    tokenizer_hash,
)

__all__ = [
    "Demonstration",
    "Message",
    "Prompt",
    "Ranking",
    "Row",
    "encode_demonstration",
    "encode_prompt",
    "encode_responses",
    "load_demonstrations",
    "load_prompts",
    "load_rankings",
    "load_texts",
    "prepare_tokenizer",
    "read_rows",
    "rows_from_memory",
    "split_by_prompt",
    "template_hash",
    "tokenizer_hash",
]
