"""Logits are worked on a few rows at a time where they are many: the same numbers, and a peak that does not
grow with tokens x vocabulary."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

import tiny_models
from pipeline.config.schema import Lora
from pipeline.models import forward
from pipeline.models.adapters import add_lora
from pipeline.models.forward import layout, of_predictions, response_logprobs
from pipeline.models.packing import inner, pack_if_possible, packs
from pipeline.models.sequences import Sequences
from pipeline.models.tokens import logprobs_and_entropy
from pipeline.ppo.networks import PolicyAndValue
from pipeline.training.supervised import _nats_and_right

S = Sequences.of([[2, 7, 8, 3], [2, 9, 3]], [[10, 11, 12, 4], [13, 14, 4]], 0)
N = int(S.response_mask.sum())


def observed(model, of, at_once, monkeypatch, autocast=False):
    """What `of` says of the responses, and every gradient of a weighted sum of it."""
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", at_once)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, _ = of_predictions(model, S, of)
    weights = torch.linspace(-1, 2, N)
    sum(((k + 1) * weights * y).sum() for k, y in enumerate(out) if y.requires_grad).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [y.detach() for y in out], grads


def check_the_same(model, of, rows, monkeypatch, tolerance=1e-6, **kwargs):
    """In slices of so many rows, and whole."""
    size = inner(model).get_output_embeddings().weight.shape[0]
    whole = observed(model, of, N * size, monkeypatch, **kwargs)
    calls = []
    head = inner(model).get_output_embeddings()
    with head.register_forward_hook(lambda _, __, out: calls.append(out[..., 0].numel())):
        sliced = observed(model, of, rows * size, monkeypatch, **kwargs)
    assert max(calls) <= rows
    for ours, theirs in zip(sliced[0], whole[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert sliced[1].keys() == whole[1].keys() and whole[1]
    for name, grad in whole[1].items():
        gap = float((sliced[1][name] - grad).abs().max() / grad.abs().max().clamp(min=1.0))
        assert gap <= 50 * tolerance, name  # rounding of logits grows on its way through the model


def statistic(entropy_grad: bool):
    return partial(logprobs_and_entropy, temperature=0.7, entropy_grad=entropy_grad)


def large(vocabulary: int, dtype, kind: str):
    """A Llama whose head trains, is frozen, is tied to the embeddings, or has an adapter."""
    sizes = {"vocab_size": vocabulary, "tie_word_embeddings": kind == "tied"}
    sizes["initializer_range"] = 0.1  # float32 rounds more where gradients are large
    model = tiny_models.policy(0, dtype, **sizes)
    if kind in ("frozen", "adapter"):
        names = ["q_proj", "lm_head"] if kind == "adapter" else ["q_proj"]
        model = add_lora(model, Lora(r=2, target_modules=names), "CAUSAL_LM").to(dtype)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.05)
    pack_if_possible(model)
    return model.eval()


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("kind", ["trains", "frozen", "tied", "adapter"])
@pytest.mark.parametrize("vocabulary", [16384, 49152, 151936])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_slices_give_what_whole_logits_give(vocabulary, dtype, kind, entropy_grad, monkeypatch):
    model = large(vocabulary, dtype, kind)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6
    check_the_same(model, statistic(entropy_grad), 3, monkeypatch, tolerance)


@pytest.mark.parametrize("kind", ["trains", "frozen"])
def test_in_bf16_too(kind, monkeypatch):
    model = large(16384, torch.float32, kind)
    check_the_same(model, statistic(True), 3, monkeypatch, 2e-2, autocast=True)


@pytest.mark.parametrize("kind", [*tiny_models.CAUSAL, "mistral-window", "bloom"])
def test_every_kind_of_causal_model(kind, monkeypatch):
    exact = kind != "bloom"  # in float64 its masks make left padding not a number
    model = tiny_models.causal(kind).to(torch.float64 if exact else torch.float32)
    pack_if_possible(model)
    assert packs(model) == (kind in tiny_models.CAUSAL)
    check_the_same(model, statistic(False), 2, monkeypatch, 1e-6 if exact else 1e-5)


@pytest.mark.parametrize("kind", tiny_models.SEQ2SEQ)
def test_every_kind_of_encoder_decoder(kind, monkeypatch):
    """T5 scales what its head sees; BART and its kin add a bias to what it says."""
    model = tiny_models.seq2seq(kind, dtype=torch.float64)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    for of in (statistic(False), _nats_and_right):
        check_the_same(model, of, 2, monkeypatch)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_a_model_that_does_more_than_its_head_keeps_whole_logits(kind, monkeypatch):
    """Soft caps and scales of the logits."""
    if kind == "gemma2":
        model = tiny_models.causal(kind)
    else:
        name, change = {
            "cohere": ("Cohere", {"logit_scale": 0.3}),
            "granite": ("Granite", {"logits_scaling": 3.0}),
        }[kind]
        config = vars(tiny_models.llama_config())
        kept = {k: config[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")}
        kept |= {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        kept |= {"pad_token_id": 0, "eos_token_id": 4, "bos_token_id": None}
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**kept, **change)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    pack_if_possible(model)
    whole = observed(model, statistic(False), 29 * N, monkeypatch)
    for _ in range(2):  # found out, and remembered
        asked = observed(model, statistic(False), 29 * 2, monkeypatch)
        assert all(map(torch.equal, asked[0], whole[0]))
    assert model in forward._MORE_THAN_A_HEAD


def test_few_logits_are_taken_whole_and_the_bits_are_those_of_the_plain_formula():
    model = tiny_models.policy(0)
    pack_if_possible(model)
    rows = []
    hook = model.lm_head.register_forward_hook(lambda _, __, out: rows.append(out.shape[1]))
    with hook:
        got = response_logprobs(model, S, 0.7)[S.response_mask]
        plain = statistic(False)(layout(model).logits(model, S), S.responses[S.response_mask])[0]
    assert torch.equal(got, plain)
    assert rows == [N, N]


def test_a_value_head_on_the_trunk_sees_the_same_states(monkeypatch):
    for model in (tiny_models.policy(0), tiny_models.seq2seq("t5")):
        networks = PolicyAndValue(model, None)
        torch.nn.init.normal_(networks.value_head.weight)
        seen = []
        for at_once in (29 * N, 29 * 2):
            monkeypatch.setattr(forward, "LOGITS_AT_ONCE", at_once)
            seen.append(networks(S, 0.7))
        for name in ("logprobs", "entropies", "values"):
            whole, sliced = (getattr(out, name) for out in seen)
            torch.testing.assert_close(sliced, whole, rtol=1e-5, atol=1e-5)


PEAK = """
import sys, torch, tiny_models
from functools import partial
from pipeline.models.forward import of_predictions
from pipeline.models.packing import pack_if_possible
from pipeline.models.sequences import Sequences
from pipeline.models.tokens import logprobs_and_entropy
from pipeline.process.memory import peak_mb
torch.set_num_threads(1)
model = tiny_models.policy(0, vocab_size=49152, max_position_embeddings=512)
model.requires_grad_(sys.argv[2] != "frozen").model.requires_grad_(True)
pack_if_possible(model)
s = Sequences.of([[2, 3]] * int(sys.argv[1]), [[5] * 256] * int(sys.argv[1]), 0)
of = partial(logprobs_and_entropy, temperature=1.0, entropy_grad=sys.argv[2] == "entropy")
(logprobs, entropies), _ = of_predictions(model, s, of)
(logprobs.sum() + entropies.sum()).backward()
print(peak_mb())
"""


@pytest.mark.parametrize("how", ["trains", "frozen", "entropy"])
def test_the_peak_does_not_grow_with_tokens_times_vocabulary(how):
    def peak(episodes: int) -> float:
        command = [sys.executable, "-c", PEAK, str(episodes), how]
        here = Path(__file__).parent
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
        return float(done.stdout)

    few, many = peak(2), peak(6)  # 512 and 1,536 tokens: 96 and 288 MiB of logits
    assert many < few + 60
