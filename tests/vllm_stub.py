"""As much of vLLM as TRL's helper touches, with a transformers model behind it.

What the helper is told reaches `SamplingParams` here, and the weights that it sends replace those of a
model that was loaded from disk: forgotten weights or settings show in what is sampled.
"""

import os
import sys
import types
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.models.generation import Stop, sample
from pipeline.models.tokens import left_pad

VERSION = "0.27.0"  # one that TRL's helper knows
DTYPE: torch.dtype | None = torch.float32
LOADED: list["LLM"] = []


@dataclass
class SamplingParams:
    """The keys we give; another is an error, as in vLLM."""

    n: int
    repetition_penalty: float
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    logprobs: int
    stop_token_ids: list[int]
    stop: list[str] = field(default_factory=list)
    include_stop_str_in_output: bool = False


class LLM:
    """An engine with weights of its own."""

    def __init__(self, model: str, enable_sleep_mode: bool, max_model_len: int, **options):
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.options = {**options, "max_model_len": max_model_len}
        self.asleep: set[str] = set()
        self.said: list[SamplingParams] = []
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=worker),
            model_config=SimpleNamespace(dtype=DTYPE),
        )
        LOADED.append(self)

    def load_weights(self, weights) -> None:
        assert "weights" not in self.asleep
        mine = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in weights:
                mine[name].copy_(tensor)  # an unknown name is an error

    def sleep(self, level: int) -> None:
        self.asleep = {"weights", "kv_cache"}
        with torch.no_grad():
            for p in self.model.parameters():
                p.zero_()

    def wake_up(self, tags: list[str]) -> None:
        self.asleep -= set(tags)

    def reset_prefix_cache(self) -> None:
        pass

    def generate(self, prompts: list[dict], sampling_params: SamplingParams, use_tqdm: bool):
        assert not self.asleep
        self.said.append(sampling_params)
        asked = [prompt["prompt_token_ids"] for prompt in prompts]
        responses, logprobs = sampled(self.model, self.tokenizer, asked, sampling_params)
        return [
            SimpleNamespace(
                prompt_token_ids=ids,
                outputs=[
                    SimpleNamespace(
                        token_ids=row,
                        logprobs=[
                            {token: SimpleNamespace(logprob=number, rank=1)}
                            for token, number in zip(row, numbers, strict=True)
                        ],
                    )
                ],
            )
            for ids, row, numbers in zip(asked, responses, logprobs, strict=True)
        ]


def sampled(model, tokenizer, prompts: list[list[int]], params) -> tuple[list, list]:
    """Responses and their tokens' logprobs, by a sampler that is tested elsewhere."""
    assert (params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (1, 0, 0, 1)
    assert params.n == 1
    ids, mask = left_pad(prompts, 0)
    out = sample(
        model,
        ids,
        mask,
        max_new_tokens=params.max_tokens,
        temperature=params.temperature,
        stop=Stop(params.stop_token_ids, params.stop, tokenizer),
        pad_id=0,
    )
    lengths = out.lengths.tolist()
    return (
        [row[:n] for row, n in zip(out.responses.tolist(), lengths, strict=True)],
        [row[:n] for row, n in zip(out.logprobs.tolist(), lengths, strict=True)],
    )


def install(monkeypatch) -> None:
    """Have `import vllm` find this until the test ends, and TRL look again whether it is there."""
    LOADED.clear()
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the helper sets RANK, WORLD_SIZE, ...
    contents = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams, "RequestOutput": SimpleNamespace},
        "vllm.sampling_params": {"StructuredOutputsParams": SimpleNamespace},
        "vllm.utils": {},
        "vllm.utils.network_utils": {"get_ip": lambda: "127.0.0.1"},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.nccl_engine": {
            "NCCLTrainerSendWeightsArgs": SimpleNamespace,
            "NCCLWeightTransferEngine": SimpleNamespace,
        },
    }
    for name, names in contents.items():
        module = types.ModuleType(name)
        module.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
        vars(module).update(names, __version__=VERSION)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("trl.generation.vllm_generation", "trl.generation.vllm_client"):
        monkeypatch.delitem(sys.modules, name, raising=False)
