"""Decoding a token at a time: which rows are alive, their keys and values, the next logits.

Prompts are read packed, without their padding. Every layer's keys and values lie in one buffer made
once, and a row that has ended gives its place to one that has not, so that no step computes for
rows that are finished. Models that cannot be packed use transformers' own cache, and those that have
none read the whole text again at each step.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutput

from pipeline.models.causal import accepts
from pipeline.models.encoder_decoder import decoder_prefix, embedded, is_encoder_decoder
from pipeline.models.packing import Model, inner, pack, packs
from pipeline.models.tokens import position_ids, to_the_left


def decoder(model: Model, queries: Tensor, query_mask: Tensor, max_new_tokens: int) -> "Decoder":
    """The fastest decoder that the model can use, for left-padded queries (B, Q)."""
    kind: type[Decoder]
    if is_encoder_decoder(model):
        kind = CrossDecoder
    elif packs(model):
        kind = PackedDecoder
    else:
        kind = CachedDecoder if accepts(model, "past_key_values") else Decoder
    return kind(model, queries, query_mask, max_new_tokens)


class Decoder:
    """Reads all of the text at each step: slow, and right for any causal model."""

    def __init__(self, model: Model, queries: Tensor, query_mask: Tensor, max_new_tokens: int):
        self.model, self.max_new_tokens = model, max_new_tokens
        self.ids, self.mask = queries, query_mask.long()
        self.rows = len(queries)

    def start(self) -> Tensor:
        """Logits (B, V) of the first tokens."""
        return self._logits(self.ids)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) of what follows `tokens` (B,)."""
        self._append(tokens)
        return self._logits(self.ids)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (indices), in this order, alone."""
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def _append(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)

    def _logits(self, ids: Tensor, **kwargs: Any) -> Tensor:
        if accepts(self.model, "position_ids"):
            kwargs["position_ids"] = position_ids(self.mask)[:, -ids.shape[1] :]
        if accepts(self.model, "logits_to_keep"):
            kwargs["logits_to_keep"] = 1
        return self.model(input_ids=ids, attention_mask=self.mask, **kwargs).logits[:, -1]


class CachedDecoder(Decoder):
    """With transformers' own cache and padded prompts."""

    def start(self) -> Tensor:
        self.cache = DynamicCache(config=inner(self.model).config)
        return self._logits(self.ids, past_key_values=self.cache, use_cache=True)

    def step(self, tokens: Tensor) -> Tensor:
        self._append(tokens)
        return self._logits(tokens[:, None], past_key_values=self.cache, use_cache=True)

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.cache.batch_select_indices(rows)


class CrossDecoder(Decoder):
    """Of an encoder-decoder: the prompts are read once, and each layer's view of them is kept."""

    def start(self) -> Tensor:
        ids, mask = to_the_left(self.ids, self.mask.bool())
        self.mask = mask.long()
        self.read = inner(self.model).get_encoder()(input_ids=ids, attention_mask=self.mask)[0]
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        prefix = torch.tensor(decoder_prefix(inner(self.model).config), device=ids.device)
        return self._next(prefix.expand(len(ids), -1))

    def step(self, tokens: Tensor) -> Tensor:
        return self._next(tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        self.mask, self.read = self.mask[rows], self.read[rows]
        self.cache.batch_select_indices(rows)

    def _next(self, ids: Tensor) -> Tensor:
        """Logits (B, V) of what follows the decoder's ids (B, w)."""
        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.read),  # type: ignore[arg-type]
            attention_mask=self.mask,
            decoder_inputs_embeds=embedded(self.model, ids),
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.logits[:, -1]


class PackedDecoder(Decoder):
    """With packed prompts and one buffer a layer."""

    def start(self) -> Tensor:
        packed = pack(self.ids, self.mask)
        self.filled = self.mask.sum(dim=1)
        width = self.ids.shape[1] + self.max_new_tokens
        self.place = Place(packed.index, self.mask.bool(), width)
        layers = [Layer(self.place) for _ in range(inner(self.model).config.num_hidden_layers)]
        self.cache = Cache(layers=layers)
        visible = torch.nn.functional.pad(self.mask.bool(), (0, self.max_new_tokens), value=True)
        self.visible = None if bool(visible.all()) else visible[:, None, None]
        last = packed.index[:, -1]
        inputs = {**packed.inputs(), "use_cache": True, "past_key_values": self.cache}
        logits = self.model(**inputs, logits_to_keep=last).logits[0]
        self.place.columns = self.ids.shape[1]
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        end = self.place.columns + 1
        whole = torch.ones(len(tokens), 1, 1, end, dtype=torch.bool, device=tokens.device)
        out = self.model(
            input_ids=tokens[:, None],
            position_ids=self.filled[:, None],
            attention_mask=whole if self.visible is None else self.visible[:, :, :, :end],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.place.columns = end
        self.filled = self.filled + 1
        return out.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        self.filled = self.filled[rows]
        if self.visible is not None:
            self.visible = self.visible[rows]
        for layer in self.cache.layers:
            layer.move(rows)  # type: ignore[attr-defined]
        self.place.rows = len(rows)


def survivors(ended: Tensor) -> Tensor:
    """Rows that go on, in an order in which few of them move: the last ones fill the gaps.

    ended (B,) bool -> indices of the rows that have not ended; row i of them stays at i, unless the
    row at i has ended.
    """
    alive = torch.nonzero(~ended).flatten()
    count = len(alive)
    order = torch.arange(count, device=ended.device)
    order[ended[:count]] = alive[alive >= count]
    return order


class Place:
    """Where all layers write next: columns filled so far, rows in use, and the packed prompts."""

    def __init__(self, index: Tensor, mask: Tensor, width: int):
        self.index, self.mask, self.width = index, mask, width
        self.rows, self.columns = len(index), 0


class Layer(CacheLayerMixin):
    """Keys and values of one layer: (B, heads, width, D), of which rows and columns are in use."""

    is_sliding = False

    def __init__(self, place: Place):
        super().__init__()
        self.place = place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.place.rows, key_states.shape[1], self.place.width)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values; returns what attention reads: the packed prompts themselves,
        later everything so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            for buffer, states in ((self.keys, key_states), (self.values, value_states)):
                prompts = states[0].transpose(0, 1)  # (N, heads, D)
                mask = self.place.mask
                buffer.transpose(1, 2)[:, : mask.shape[1]][mask] = prompts[self.place.index[mask]]
            return key_states, value_states
        rows, end = self.place.rows, self.place.columns + 1
        self.keys[:rows, :, end - 1 : end] = key_states
        self.values[:rows, :, end - 1 : end] = value_states
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]

    def move(self, rows: Tensor) -> None:
        """Bring these rows to the front."""
        to = torch.nonzero(rows != torch.arange(len(rows), device=rows.device)).flatten()
        end = self.place.columns
        for buffer in (self.keys, self.values):
            buffer[to, :, :end] = buffer[rows[to], :, :end]

    def get_seq_length(self) -> int:
        return self.place.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.columns + query_length, 0

    def get_max_length(self) -> int:
        return self.place.width
