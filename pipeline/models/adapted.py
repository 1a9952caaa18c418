"""Policies as people have them: whole, or an adapter of peft beside the name of its base."""

import json
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from pipeline.errors import UserError
from pipeline.models.loading import check_policy, load_policy, load_tokenizer
from pipeline.process import hub


def check_adapted(path: str) -> None:
    """UserError where there is no language model; no weight is read."""
    check_policy(_base_of_adapter(path) or path)


def load_adapted(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A policy and its tokenizer; an adapter of peft is folded into the base that it names."""
    base = _base_of_adapter(path)
    if base is None:
        tokenizer = load_tokenizer(path)
        return load_policy(path, tokenizer), tokenizer
    from peft import PeftModel

    own = any(Path(path).glob("tokenizer*"))
    tokenizer = load_tokenizer(path if own else base)
    model = load_policy(base, tokenizer)
    try:
        return PeftModel.from_pretrained(model, path).merge_and_unload(), tokenizer
    except (OSError, ValueError, RuntimeError) as error:
        told = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: an adapter that does not fit its base {base}: {told}") from error


def _base_of_adapter(path: str) -> str | None:
    if Path(path, "config.json").is_file():
        return None
    hub.look(path)
    try:
        file = find_adapter_config_file(path)
    except (OSError, ValueError):  # no model at all, which its loading tells
        return None
    return file and json.loads(Path(file).read_bytes())["base_model_name_or_path"]
