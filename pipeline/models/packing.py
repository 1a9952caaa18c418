"""Forward passes without padding: the sequences of a batch lie end to end in one row.

Matrix products see real tokens alone; only attention looks at sequences side by side. Stock transformers
models run this way through their attention interface: the layout of the row travels in the place of the
attention mask, which models hand to every layer as it is.

A long beginning that neighbours have in common, such as the prompt of K responses, is there once.

`pack_if_possible` tries a model both ways and turns packing on when they agree; what cannot be packed
(sliding windows, soft-capped logits, attention that bypasses the interface) keeps padded batches.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.models.tokens import position_ids
from pipeline.process.progress import say

Model = Any
"""A transformers model, bare or in peft's wrapper; `nn.Module` declares none of what we call."""

IMPLEMENTATION = "packed_sdpa"
"""Name of our attention in transformers' registry; ordinary masks go to its own `sdpa`."""


@dataclass
class Packed:
    """B sequences of N real tokens in all, of at most L tokens each, as one row."""

    ids: Tensor  # (1, N)
    positions: Tensor  # (1, N), from 0 in every sequence
    layout: Tensor  # (1, 1, B, L) int64: a sequence's tokens as places in the row; N = padding
    # ((1, 2, B, L), the same twice, where sequences share places)
    index: Tensor  # (B, width) of the padded batch -> place in the row (of real tokens)

    def inputs(self) -> dict[str, Any]:
        """Arguments of a model's forward."""
        return {
            "input_ids": self.ids,
            "position_ids": self.positions,
            "attention_mask": self.layout,
            "use_cache": False,
        }


def pack(ids: Tensor, mask: Tensor) -> Packed:
    """Lay a padded batch end to end; ids (B, W), mask (B, W), real tokens of a row without a gap."""
    real = mask.bool()
    lengths = real.sum(dim=1)
    count = int(lengths.sum())
    steps = torch.arange(int(lengths.max()), device=ids.device)
    starts = lengths.cumsum(0) - lengths
    layout = torch.where(steps < lengths[:, None], starts[:, None] + steps, count)
    packed = Packed(
        ids=ids[real][None],
        positions=position_ids(real)[real][None],
        layout=layout[None, None],
        index=real.flatten().long().cumsum(0).sub(1).view(real.shape),
    )
    return packed if layout.shape[1] < SHARED_FROM else _shared(packed)


SHARED_FROM = 128
"""Tokens from which on a common beginning is computed once; what is shorter hardly pays for the search."""


def _shared(packed: Packed) -> Packed:
    """The row without what a sequence has in common with the beginning of the one before it."""
    own, count = packed.layout[0, 0], packed.ids.shape[1]
    tokens = nn.functional.pad(packed.ids[0], (0, 1), value=-1)[own]  # (B, L)
    same = (tokens[1:] == tokens[:-1]) & (own[1:] < count)
    common = same.long().cumprod(1).sum(1).tolist()
    if max(common, default=0) < SHARED_FROM:
        return packed
    places = own.clone()
    for row, length in enumerate(common, start=1):
        if length >= SHARED_FROM:
            places[row, :length] = places[row - 1, :length]
    kept, layout = places.unique(return_inverse=True)  # padding, the highest, stays the highest
    kept, real = kept[kept < count], own < count
    layout = layout.where(real, len(kept))
    moved = torch.empty_like(packed.ids[0]).index_copy_(0, own[real], layout[real])
    return Packed(
        ids=packed.ids[:, kept],
        positions=packed.positions[:, kept],
        layout=layout.expand(1, 2, -1, -1),
        index=moved[packed.index],
    )


class _ToRows(torch.autograd.Function):
    """(N, H, D) tokens -> (B * L, H, D), sequence by sequence; padding repeats the last token."""

    @staticmethod
    def forward(ctx, tokens: Tensor, places: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return tokens.index_select(0, places.clamp(max=len(tokens) - 1))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None


class _ToTokens(torch.autograd.Function):
    """(B * L, H, D) -> (N, H, D); the gradient of padding is 0."""

    @staticmethod
    def forward(ctx, rows: Tensor, places: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return rows.index_select(0, back)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (places,) = ctx.saved_tensors
        rows = grad.index_select(0, places.clamp(max=len(grad) - 1))
        return rows.masked_fill_((places == len(grad))[:, None, None], 0.0), None, None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a row, padded on the right; query (1, H, N, D) -> (1, N, H, D)."""
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    layout = attention_mask[0, 0]
    places, count = layout.flatten(), query.shape[2]
    slots = torch.arange(len(places), device=places.device)
    back = slots.new_empty(count + 1).scatter_(0, places, slots)[:count]

    shared = attention_mask.shape[1] == 2  # a token's gradient is then a sum over its places

    def side_by_side(x: Tensor) -> Tensor:
        tokens = x.squeeze(0).transpose(0, 1)
        if shared:
            rows = tokens.index_select(0, places.clamp(max=count - 1))
        else:
            rows = _ToRows.apply(tokens, places, back)
        return rows.view(*layout.shape, *rows.shape[1:]).transpose(1, 2)  # (B, H, L, D)

    q, k, v = side_by_side(query), side_by_side(key), side_by_side(value)
    out = nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    rows = out.transpose(1, 2).reshape(len(places), *out.shape[1::2])
    tokens = rows.index_select(0, back) if shared else _ToTokens.apply(rows, places, back)
    return tokens[None], None


AttentionInterface.register(IMPLEMENTATION, packed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def packs(model: Model) -> bool:
    """Whether the model's forward passes are packed."""
    return inner(model).config._attn_implementation == IMPLEMENTATION


def pack_if_possible(model: Model) -> None:
    """`enable_packing`, with one line for a kind of causal model that cannot."""
    reason = enable_packing(model)
    if reason is not None and not inner(model).config.is_encoder_decoder:
        _say_once(f"{type(inner(model)).__name__}: batches stay padded: {reason}")


_say_once = functools.cache(say)


def enable_packing(model: Model) -> str | None:
    """Turn packing on, or say in a few words why this model keeps padded batches.

    Compares last hidden states of two short sequences, packed against padded, so that a model whose
    attention does something else is found out and not trained wrongly.
    """
    if packs(model):
        return None
    reason = unpackable(inner(model))
    if reason is not None:
        return reason
    before, training = inner(model).config._attn_implementation, model.training
    model.eval()
    padded = _probe(model, packed=False)
    try:
        inner(model).set_attn_implementation(IMPLEMENTATION)
        gap = (_probe(model, packed=True) - padded).abs().max() / padded.abs().max()
    except (
        Exception
    ) as error:  # a model's own code may raise anything on a layout it does not expect
        reason = f"its attention refused: {type(error).__name__}"
    else:
        tolerance = 0.05 if rounded(model) else 1e-4
        if not gap <= tolerance:
            reason = f"packed and padded hidden states differ by {gap.item():.0e}"
    if reason is not None:
        inner(model).set_attn_implementation(before)
    model.train(training)
    return reason


def inner(model: Model) -> Model:
    """The transformers model in peft's wrapper, if it is in one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def rounded(model: Model) -> bool:
    """Whether its weights are held in less than float32."""
    bare = inner(model)
    return bare.dtype.itemsize < 4 or getattr(bare, "is_quantized", False)


def trunk(model: Model) -> Model:
    """The model without its head."""
    bare = inner(model)
    return getattr(bare, bare.base_model_prefix)


def hidden_width(model: Model) -> int:
    """Of last hidden states, which is not `hidden_size` where a projection follows (OPT-350M)."""
    return inner(model).get_output_embeddings().weight.shape[1]


def unpackable(model: Model) -> str | None:
    config = model.config
    if config.is_encoder_decoder or not getattr(model, "_supports_attention_backend", False):
        return "its attention is its own"
    if "position_ids" not in inspect.signature(trunk(model).forward).parameters:
        return "it takes no position ids"
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if window or set(getattr(config, "layer_types", None) or []) - {"full_attention"}:
        return "sliding windows or another attention than full"
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if {"dynamic", "longrope"} & {str(value) for value in ropes.values()}:
        return "its positions depend on the longest sequence of a batch"
    if any("softcap" in key and value for key, value in config.to_dict().items()):
        return "soft-capped logits"
    return None


@torch.no_grad()
def _probe(model: Model, packed: bool) -> Tensor:
    """Last hidden states (N, d) of two short sequences."""
    device = next(model.parameters()).device
    size = inner(model).get_input_embeddings().num_embeddings
    ids = torch.arange(10, device=device).view(2, 5) * 7919 % size
    mask = torch.tensor([[False, True, True, True, False], [True] * 5], device=device)
    if packed:
        return trunk(model)(**pack(ids, mask).inputs()).last_hidden_state[0]
    out = trunk(model)(
        input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False
    )
    return out.last_hidden_state[mask]
