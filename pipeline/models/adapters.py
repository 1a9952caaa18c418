"""Low-rank adapters (peft): one on a model of its own, or several on one shared base.

On a shared base the policy, the reward model and the value network are adapters, and the reference is
the base with none: four models for the memory of one. Which adapter works is a flag on its layers.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config.schema import Lora
from pipeline.errors import UserError
from pipeline.models.packing import Model, hidden_width, rounded

ADAPTER = "adapter"
"""Folder of a model that was trained with LoRA: its adapter, and a reward model's head, not merged."""


def add_lora(model: Model, lora: Lora | None, task: str) -> Model:
    """Wrap in a peft LoRA model (`task` CAUSAL_LM, of encoder-decoders too, or SEQ_CLS), or return the
    model as it is.

    A sequence classifier's head trains in full beside its adapters.
    """
    if lora is None:
        return model
    from peft import get_peft_model  # slow to import, and only LoRA runs need it

    if task == "CAUSAL_LM" and model.config.is_encoder_decoder:
        task = "SEQ_2_SEQ_LM"
    try:
        adapted = get_peft_model(model, _config(lora, task))
    except ValueError as error:  # nothing in the model has that name
        raise UserError(f"lora.target_modules: {error}") from error
    # that a base is quantised TRL takes for a wish to train adapters in bf16, but for those it resumes with
    adapted.is_loaded_in_8bit = adapted.is_loaded_in_4bit = False
    return adapted


def _config(lora: Lora, task: str):
    """peft's config of an adapter."""
    from peft import LoraConfig

    head = ["score"] if task == "SEQ_CLS" else None
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=head,
        modules_to_save=head,
        task_type=task,
    )


def merged(model: Model, base: Callable[[], Model] | None = None) -> Model:
    """A plain transformers model: the adapter folded into the weights it adapts; where these are rounded
    (bf16, int8, nf4) into those of `base()`, the same in float32."""
    if not hasattr(model, "merge_and_unload"):
        return model
    if base is not None and rounded(model):
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        trained = get_peft_model_state_dict(model, save_embedding_layers=False)
        model = get_peft_model(base(), model.peft_config["default"])
        set_peft_model_state_dict(model, trained)
    return model.merge_and_unload()


@contextlib.contextmanager
def adapter_off(model: Model) -> Iterator[None]:
    """Within, a model with adapters computes as its base does."""
    # peft's own context would also freeze the adapters that are not active
    with _flag(model, "_disable_adapters", True):
        yield


@contextlib.contextmanager
def _using(model: Model, name: str) -> Iterator[None]:
    """Within, the adapter `name` is the one that works."""
    with _flag(model, "_active_adapter", [name]):
        yield


def checkpoint_layers(model: Model) -> None:
    """Compute the layers again going backward, each with the adapter that worked going forward."""
    how: dict = {"use_reentrant": False}
    if hasattr(model, "peft_config"):
        from peft.tuners.tuners_utils import BaseTunerLayer

        layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
        # asked when a layer goes forward: what is around that pass, and around the one again
        how["context_fn"] = lambda: (
            contextlib.nullcontext(),
            _using(model, layer.active_adapters[0]),
        )
    model.gradient_checkpointing_enable(how)


@contextlib.contextmanager
def _flag(model: Model, name: str, value: object) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [getattr(layer, name) for layer in layers]
    for layer in layers:
        setattr(layer, name, value)
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            setattr(layer, name, old)


# --- a shared base --------------------------------------------------------------------------------


class AdapterScorer(nn.Module):
    """A scalar head on a base that others use too, through an adapter of its own.

    `score` is the head, `reward_bias` what is taken off its output; `weights` are the adapter's.
    """

    def __init__(self, base: Model, adapter: str, score: nn.Linear, reward_bias: float):
        super().__init__()
        self.score, self.reward_bias, self.adapter = score, reward_bias, adapter
        own = [p for name, p in base.named_parameters() if f".{adapter}." in name]
        self.weights = nn.ParameterList(own)
        self._base = (base,)  # in a tuple, so that the base counts as the policy's

    def get_base_model(self) -> Model:
        """The transformers model under the adapters."""
        return self._base[0].get_base_model()

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Within, the base computes with this scorer's adapter."""
        return _using(self._base[0], self.adapter)


def save_adapter(model: Model, folder: Path) -> None:
    """Write a model's own adapter, and its head, beside its merged weights."""
    model.save_pretrained(folder, selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)  # peft's form for a hub page


def scorers_on(
    policy: Model, rm: Path | None, value_lora: Lora, bias: float = 0.0
) -> tuple[AdapterScorer | None, AdapterScorer]:
    """The reward model, frozen, and the value network, trainable, as adapters on a LoRA policy.

    The value network starts as a copy of the reward model; without one it starts at the base.
    """
    if rm is None:
        _add(policy, "value", _config(value_lora, "CAUSAL_LM"))
        width = hidden_width(policy)
        dtype = torch.promote_types(policy.dtype, torch.float32)
        head = nn.Linear(width, 1, bias=False, dtype=dtype)
        nn.init.normal_(head.weight, std=1 / math.sqrt(width + 1))
        return None, AdapterScorer(policy, "value", head, 0.0)
    config, weights, head_weight = _read_adapter(rm)
    if not hasattr(policy.get_base_model(), "model"):
        # T5's trunk has no name of its own in the policy, and one in a reward model of ours
        weights = {key.replace(".model.model.", ".model.", 1): w for key, w in weights.items()}
    out = []
    for name in ("reward", "value"):
        _add(policy, name, config, weights)
        head = nn.Linear(head_weight.shape[1], 1, bias=False)
        head.weight.data = head_weight.clone()
        out.append(AdapterScorer(policy, name, head, bias))
    reward, value = out
    reward.requires_grad_(False)
    return reward, value


def _add(policy: Model, name: str, config, weights: dict[str, Tensor] | None = None) -> None:
    """Another trainable adapter; the others stay as trainable as they were."""
    from peft import set_peft_model_state_dict

    trainable = {key for key, p in policy.named_parameters() if p.requires_grad}
    policy.add_adapter(name, config)
    if weights is not None:
        told = set_peft_model_state_dict(policy, weights, adapter_name=name)
        if told.unexpected_keys:
            raise UserError(f"the reward model's adapter does not fit: {told.unexpected_keys[:3]}")
    for key, p in policy.named_parameters():
        p.requires_grad_(key in trainable or f".{name}." in key)


def _read_adapter(rm: Path):
    """peft config, adapter weights, and head (1, d) that a reward stage with LoRA has published."""
    from peft import LoraConfig
    from safetensors.torch import load_file

    folder = rm / ADAPTER
    if not folder.is_dir():
        raise UserError(
            f"{rm}: shared_base needs a reward model trained with lora (it has no {ADAPTER}/); "
            "set lora in rm.yaml and make rm again, or shared_base: false"
        )
    config = LoraConfig.from_pretrained(folder)
    config.modules_to_save, config.exclude_modules, config.task_type = None, None, "CAUSAL_LM"
    config.inference_mode = False
    weights = load_file(folder / "adapter_model.safetensors")
    heads = [key for key in weights if key.endswith("score.weight")]
    return config, {k: v for k, v in weights.items() if k not in heads}, weights[heads[0]]
