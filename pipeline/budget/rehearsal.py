"""The stages' passes without data: models of a config's shape, on tensors that hold nothing.

A model of a few layers stands for one of many, since bytes, operations and seconds are linear in layers.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.cache_utils import Cache

from pipeline.budget.machines import Machine
from pipeline.budget.meter import Meter
from pipeline.config.schema import Dtype, Lora
from pipeline.models.adapters import add_lora, checkpoint_layers
from pipeline.models.decoding import Layer, PackedDecoder, Place
from pipeline.models.forward import LOGITS_AT_ONCE
from pipeline.models.generation import drawn
from pipeline.models.needs import HELD
from pipeline.models.packing import IMPLEMENTATION, Model, inner, pack, trunk, unpackable
from pipeline.models.tokens import in_slices, logprobs_and_entropy, logprobs_of

FEW = (1, 2)
"""Layers of the models that are rehearsed."""


@dataclass(frozen=True)
class Batch:
    """Rows of a prompt and a response; `k` neighbours have the same prompt."""

    rows: int
    prompt: int  # tokens
    response: int
    k: int = 1


def over_layers(
    config: PreTrainedConfig, numbers: Callable[[PreTrainedConfig], dict[str, float]]
) -> dict[str, float]:
    """Numbers of the config's whole depth, from those of a few layers."""
    layers = config.get_text_config().num_hidden_layers
    if layers <= FEW[1]:
        return numbers(config)
    few, more = (numbers(_with_layers(config, count)) for count in FEW)
    by = (layers - FEW[0]) / (FEW[1] - FEW[0])
    return {name: few[name] + (more[name] - few[name]) * by for name in more}


def parameters(config: PreTrainedConfig) -> float:
    """Of the whole model."""

    def count(shallow: PreTrainedConfig) -> dict[str, float]:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shallow)
        return {"": float(sum(p.numel() for p in model.parameters()))}

    return over_layers(config, count)[""]


def _with_layers(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    text.num_hidden_layers = count
    return shallow


class Rehearsal:
    """Passes of models of one shape, metered."""

    def __init__(
        self, config: PreTrainedConfig, machine: Machine, precision: str, checkpointing: bool
    ):
        self.config, self.checkpointing = copy.deepcopy(config), checkpointing
        self.config.num_labels = 1
        self.text = config.get_text_config()
        self.meter = Meter(machine, self.text.vocab_size)
        self.fake = FakeTensorMode()
        self.cast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    # --- models ---------------------------------------------------------------------------------

    def policy(self, lora: Lora | None, dtype: Dtype) -> Model:
        """A language model, trained if in float32 or with adapters."""
        return self._model(AutoModelForCausalLM, lora, dtype, "CAUSAL_LM")

    def scorer(self, lora: Lora | None, dtype: Dtype) -> Model:
        """The same trunk under a scalar head."""
        return self._model(AutoModelForSequenceClassification, lora, dtype, "SEQ_CLS")

    def _model(self, kind: Any, lora: Lora | None, dtype: Dtype, task: str) -> Model:
        with torch.device("meta"):
            model = kind.from_config(self.config)
            if dtype == "bf16":
                model.to(torch.bfloat16)
            if unpackable(model) is None:
                model.set_attn_implementation(IMPLEMENTATION)
            model = add_lora(model, lora, task)
        if self.checkpointing:
            checkpoint_layers(model)
        self._onto_the_cpu(model)
        return model

    def _onto_the_cpu(self, model: nn.Module) -> None:
        """Give a model that has no device tensors without data that say they are on one."""
        new: dict[int, Tensor] = {}
        for module in model.modules():
            tables: list[dict[str, Any]] = [module._parameters, module._buffers]
            for held in tables:
                for name, old in held.items():
                    if old is not None:
                        with self.fake:
                            empty = torch.empty(old.shape, dtype=old.dtype)
                        if isinstance(old, nn.Parameter):
                            empty = nn.Parameter(empty, old.requires_grad)
                        held[name] = new.setdefault(id(old), empty)

    # --- passes ---------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str, times: float = 1.0, grad: bool = False) -> Iterator[None]:
        """Within, passes are metered under a name."""
        with self.fake, self.meter.phase(name, times), torch.set_grad_enabled(grad), self.cast:
            yield

    def hidden(self, model: Model, batch: Batch, at: str) -> Tensor:
        """Last hidden states (n, d) `at` the places that predict the responses' tokens (`response`), those
        that predict any (`all`), or the `end`s."""
        model.train(torch.is_grad_enabled())
        inputs, places = self._inputs(model, batch, at)
        states = trunk(model)(**inputs).last_hidden_state
        return states.flatten(end_dim=1)[places]

    def _inputs(self, model: Model, batch: Batch, at: str) -> tuple[dict[str, Any], Tensor]:
        length = batch.prompt + batch.response - (at != "end")
        with _nothing_fake():
            prompts = torch.randint(100, (-(-batch.rows // batch.k), batch.prompt))
            ids = torch.randint(100, (batch.rows, length))
            ids[:, : batch.prompt] = prompts.repeat_interleave(batch.k, 0)[: batch.rows, :length]
            where = torch.zeros_like(ids, dtype=torch.bool)
            first = {"response": batch.prompt - 1, "all": 0, "end": length - 1}[at]
            where[:, first:] = True
            if inner(model).config._attn_implementation == IMPLEMENTATION:
                packed = pack(ids, torch.ones_like(ids))
                inputs, places = packed.inputs(), packed.index[where]
            else:
                inputs, places = {"input_ids": ids, "use_cache": False}, where.flatten().nonzero()
                places = places.flatten()
        faked = {n: self._fake(v) if isinstance(v, Tensor) else v for n, v in inputs.items()}
        return faked, self._fake(places)

    def _fake(self, tensor: Tensor) -> Tensor:
        return self.fake.from_tensor(tensor)

    def logprobs(self, model: Model, batch: Batch, at: str = "response", rows: int = 0) -> Tensor:
        """Of the tokens at those places, as `pipeline.models.forward.of_predictions` computes them; `rows` of
        logits at a time if they are limited otherwise."""
        states = self.hidden(model, batch, at)
        ids = torch.zeros(len(states), dtype=torch.long)
        head = inner(model).get_output_embeddings()
        rows = rows or max(1, LOGITS_AT_ONCE // self.text.vocab_size)

        def of(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            return logprobs_and_entropy(logits, ids, 1.0, entropy_grad=False)

        if len(states) <= rows:
            return of(head(states), ids)[0]
        return in_slices(head, head.weight.requires_grad, states, ids, of, rows)[0]

    def scores(self, model: Model, batch: Batch, at: str = "response") -> Tensor:
        """A scorer's numbers."""
        head = inner(model).score
        head = getattr(head, "modules_to_save", {"default": head})["default"]
        return head(self.hidden(model, batch, at).to(head.weight.dtype)).float()

    def prefill(self, model: Model, batch: Batch) -> Tensor:
        """The first tokens' logits."""
        states = self.hidden(model, Batch(batch.rows, batch.prompt, 0, batch.k), "end")
        return inner(model).get_output_embeddings()(states)

    def cache(self, model: Model, batch: Batch) -> PackedDecoder:
        """A decoder with so many rows, half way through their responses."""
        with _nothing_fake():
            mask = torch.ones(batch.rows, batch.prompt, dtype=torch.bool)
            place = Place(mask.long(), mask, batch.prompt + batch.response)
            place.columns = batch.prompt + batch.response // 2
        decoder = object.__new__(PackedDecoder)
        decoder.model, decoder.place = model, place
        decoder.filled = torch.zeros(batch.rows, dtype=torch.long)
        decoder.visible = torch.ones(batch.rows, 1, 1, place.width, dtype=torch.bool)
        heads = self.text.num_attention_heads
        width = getattr(self.text, "head_dim", None) or self.text.hidden_size // heads
        shared = getattr(self.text, "num_key_value_heads", None) or heads
        states = torch.zeros(batch.rows, shared, 1, width, dtype=inner(model).dtype)
        layers = [Layer(place) for _ in range(self.text.num_hidden_layers)]
        for layer in layers:
            layer.lazy_initialization(states, states)
        decoder.cache = Cache(layers=layers)
        return decoder

    def token(self, decoder: PackedDecoder, rows: int) -> None:
        """One more token of each row, drawn."""
        decoder.model.eval()
        logits = decoder.step(torch.zeros(rows, dtype=torch.long)).float()
        logprobs_of(logits, drawn(logits, torch.zeros(rows)), 1.0)


@contextmanager
def _nothing_fake() -> Iterator[None]:
    """Within, tensors have data."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


def held(model: nn.Module, dtype: Dtype) -> tuple[float, float]:
    """Bytes of the weights, and of those that train, of a model without data."""
    frozen = trained = 0.0
    quantised = {
        id(m.weight)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and "lora_" not in name and not name.endswith(("head", "score"))
    }
    for p in model.parameters():
        if p.requires_grad:
            trained += p.numel() * p.itemsize
        elif dtype in ("int8", "nf4") and id(p) in quantised:
            frozen += p.numel() * HELD[dtype]
        else:
            frozen += p.numel() * p.itemsize
    return frozen + trained, trained
