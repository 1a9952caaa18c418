"""Random models of a few thousand parameters and a word-level tokenizer, for tests in seconds."""

from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pipeline.config.schema import Lora
from pipeline.models.adapters import add_lora
from pipeline.models.encoder_decoder import set_decoder_prefix
from pipeline.models.scorer import EncoderDecoderScorer

WORDS = [f"w{i}" for i in range(24)]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<bot> {{ m['content'] }} <end>"
    "{% else %}<user> {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


def tokenizer(pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """Words split at blanks; `pad_is_eos` makes the trap that many real tokenizers are."""
    specials = ["<pad>", "<unk>", "<user>", "<bot>", "<end>"]
    table = {word: i for i, word in enumerate(specials + WORDS)}
    inner = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<end>" if pad_is_eos else "<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        chat_template=TEMPLATE,
    )


def llama_config(**changes) -> LlamaConfig:
    sizes = {
        "vocab_size": 29,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 4,
        "bos_token_id": None,
        "initializer_range": 0.5,  # far from uniform, so that mistakes show
    }
    return LlamaConfig(**{**sizes, **changes})


def policy(seed: int = 0, dtype=torch.float32, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**changes)).to(dtype).eval()


def reward(seed: int = 1, dtype=torch.float32, bias: float = 0.0) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(llama_config(num_labels=1)).to(dtype).eval()
    model.config.reward_bias = bias
    return model


def saved_policy(folder: Path) -> str:
    """A policy and its tokenizer in a folder, as a stage takes them."""
    policy(0).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def gpt2(seed: int = 0, **changes) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 29, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "eos_token_id": 4, "bos_token_id": 4, **changes}))


CAUSAL = ["llama", "llama-gqa", "qwen2", "qwen3", "gpt2", "gpt-neox", "opt", "phi"]
CAUSAL += [f"{kind}-lora" for kind in ("llama", "llama-gqa", "qwen2", "qwen3", "gpt2", "gpt-neox")]
"""Kinds of causal models whose batches can be packed; SmolLM2 is a Llama with grouped queries."""

PADDED = ["mistral-window", "gemma2", "bloom"]
"""Kinds whose cannot."""


def causal(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model of a kind, with dropout off."""
    if kind.endswith("-lora"):
        model = add_lora(causal(kind.removesuffix("-lora"), seed), Lora(r=2), "CAUSAL_LM")
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)  # zero at first, which would hide it
        return model
    sizes = {
        "vocab_size": 29,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
        "pad_token_id": 0,
        "eos_token_id": 4,
    }
    wide = {"intermediate_size": 32, "num_key_value_heads": 1}
    makes: dict[str, tuple[str, dict]] = {
        "llama": ("Llama", {"intermediate_size": 32}),
        "llama-gqa": ("Llama", wide),
        "qwen2": ("Qwen2", wide),
        "qwen3": ("Qwen3", {**wide, "head_dim": 8}),
        "gpt-neox": ("GPTNeoX", {"intermediate_size": 32}),
        "opt": ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0}),
        "phi": ("Phi", {"intermediate_size": 32}),
        "mistral-window": ("Mistral", {**wide, "sliding_window": 3}),
        "gemma2": ("Gemma2", {**wide, "head_dim": 8}),
        "bloom": ("Bloom", {"n_head": 2, "n_layer": 2}),
    }
    if kind == "gpt2":
        quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return gpt2(seed, initializer_range=0.5, **quiet).eval()
    name, changes = makes[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**sizes, **changes})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


SEQ2SEQ = ["bart", "mbart", "m2m100", "marian", "pegasus", "t5", "mt5", "umt5"]
"""Kinds of encoder-decoders."""
_SEQ2SEQ = {"mbart": "MBart", "m2m100": "M2M100", "mt5": "MT5", "umt5": "UMT5"}


def seq2seq_config(kind: str, **changes) -> transformers.PreTrainedConfig:
    """Their starts are their own: BART's is the end token and then `<s>`, T5's is padding."""
    sizes = {"vocab_size": 29, "d_model": 16, "pad_token_id": 0, "eos_token_id": 4}
    if kind.endswith("t5"):
        sizes |= {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    else:
        for side in ("encoder", "decoder"):
            sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 32}
        sizes |= {"max_position_embeddings": 64, "init_std": 0.4, "dropout": 0.0}
    sizes["decoder_start_token_id"] = {"bart": 4, "mbart": 5, "m2m100": 4}.get(kind, 0)
    name = _SEQ2SEQ.get(kind, kind.capitalize())
    return getattr(transformers, f"{name}Config")(**{**sizes, **changes})


def seq2seq(kind: str, seed: int = 0, dtype=torch.float32, **changes) -> PreTrainedModel:
    """A random encoder-decoder of a kind, dropout off, told what its decoder reads first."""
    config = seq2seq_config(kind, **changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).to(dtype).eval()
    if kind.endswith("t5"):  # drawn so small that mistakes hide
        for p in model.parameters():
            p.data.normal_()
    model.generation_config.forced_bos_token_id = {"bart": 1, "m2m100": 6}.get(kind)
    set_decoder_prefix(model, tokenizer())
    return model


def seq2seq_reward(kind: str, seed: int = 1, dtype=torch.float32, bias: float = 0.0):
    policy = seq2seq(kind, seed, dtype)
    policy.config.reward_bias, policy.config.num_labels = bias, 1
    torch.manual_seed(seed)
    model = EncoderDecoderScorer(policy.config).to(dtype).eval()
    for p in model.parameters():
        p.data.normal_(std=0.4)
    return model
