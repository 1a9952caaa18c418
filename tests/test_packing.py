"""Packed forward passes equal padded ones in every number and gradient, or are not used."""

import pytest
import torch

import tiny_models
from pipeline.models import generation, packing
from pipeline.models.causal import hidden_at, joined, last_real, logits_at, needed, predicting
from pipeline.models.forward import (
    response_logprobs,
    score_head,
    score_sequences,
)
from pipeline.models.packing import enable_packing, inner, pack, pack_if_possible, packs
from pipeline.models.sequences import Sequences
from pipeline.models.tokens import left_pad

IDS = torch.tensor(
    [
        [0, 0, 2, 7, 8, 3, 10, 11, 12, 4, 0],
        [0, 0, 0, 2, 9, 3, 4, 0, 0, 0, 0],
        [2, 5, 6, 7, 11, 3, 14, 15, 16, 17, 18],
        [0, 0, 2, 12, 13, 3, 0, 0, 0, 0, 0],  # an empty response
        [0, 0, 0, 2, 9, 3, 10, 4, 0, 0, 0],
    ]
)
MASK = torch.tensor(
    [
        [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0],
        [1] * 11,
        [0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0],
    ]
)
WIDTH = 5
SEQUENCES = Sequences(
    IDS[:, :-WIDTH], MASK[:, :-WIDTH].bool(), IDS[:, -WIDTH:], MASK[:, -WIDTH:].bool()
)


def _gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    """Every gradient, relative to the largest number in it."""
    assert a.keys() == b.keys() and a
    for name, g in a.items():
        scale = max(b[name].abs().max().item(), 0.1)  # some, of key biases, are 0 but for rounding
        assert (g - b[name]).abs().max().item() <= tolerance * scale, name


def test_a_batch_is_laid_end_to_end_and_found_again():
    packed = pack(IDS, MASK)
    assert packed.ids.tolist() == [IDS[MASK.bool()].tolist()]
    assert packed.positions[0, :8].tolist() == list(range(8))
    assert packed.positions[0, 8:12].tolist() == [0, 1, 2, 3]
    assert packed.layout[0, 0, 1].tolist() == [8, 9, 10, 11] + [32] * 7  # 32 = padding
    for b in range(len(IDS)):
        for w in torch.nonzero(MASK[b]).flatten().tolist():
            assert packed.ids[0, packed.index[b, w]] == IDS[b, w]


@pytest.mark.parametrize("kind", tiny_models.CAUSAL)
def test_packed_logprobs_and_gradients_equal_padded_ones(kind):
    model = tiny_models.causal(kind)
    found = []
    for packed in (False, True):
        if packed:
            assert enable_packing(model) is None
            assert packs(model)
        logprobs = response_logprobs(model, SEQUENCES, temperature=0.7)
        weights = torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)
        found.append((logprobs.detach(), _gradients(model, (logprobs * weights).sum())))
    (padded, before), (packed_logprobs, after) = found
    torch.testing.assert_close(packed_logprobs, padded, rtol=1e-5, atol=1e-5)
    assert packed_logprobs[3].eq(0).all() and packed_logprobs[1, 1:].eq(0).all()
    _close(after, before, 1e-4 if "lora" in kind else 2e-5)


@pytest.mark.parametrize(
    "where", [predicting(MASK, WIDTH), last_real(MASK)], ids=["values", "scores"]
)
def test_packed_scores_and_their_gradients_equal_padded_ones_in_float64(where):
    model = tiny_models.reward(1, torch.float64, bias=0.25)
    found = []
    for packed in (False, True):
        if packed:
            enable_packing(model)
        values = score_head(model)(hidden_at(model, IDS, MASK, where))
        found.append((values.detach(), _gradients(model, values.square().sum())))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-10, atol=1e-12)
    _close(found[1][1], found[0][1], 1e-9)


@pytest.mark.parametrize("kind", tiny_models.CAUSAL)
def test_a_beginning_in_common_is_computed_once_and_changes_no_number(kind, monkeypatch):
    model = tiny_models.causal(kind).double()
    assert enable_packing(model) is None
    first, other = [2, 5, 6, 7, 8, 9], [2, 5, 6, 11, 12]
    prompts = [first, first, other, first, [2, 9], [2, 9], other, other]
    replies = [[10, 4], [10, 11, 12, 4], [7], [14, 15, 4], [8], [8], [5, 6, 4], [5, 4]]
    s = Sequences.of(prompts, replies, 0)
    found = {}
    for tokens in (999, 4):
        monkeypatch.setattr(packing, "SHARED_FROM", tokens)
        logprobs = response_logprobs(model, s, 0.7)
        found[tokens] = logprobs, _gradients(model, (logprobs * logprobs).sum())
    assert pack(*joined(s)).ids.numel() == 54 - 7 - 6, "twice a prompt and a token of the reply"
    assert (found[4][0] - found[999][0]).abs().max() < 1e-6  # norms are float32
    _close(found[4][1], found[999][1], 1e-6)


def test_samples_of_one_prompt_read_it_once_and_are_the_same(monkeypatch):
    model, stop = tiny_models.causal("llama"), generation.stops(tiny_models.tokenizer(), ())
    assert enable_packing(model) is None
    queries = left_pad([[2, 5, 6, 7, 8]] * 3 + [[2, 9]] + [[2, 5, 6, 11, 12, 13]] * 4, 0)
    uniforms = torch.linspace(0.05, 0.95, 32).view(8, 4)
    found = []
    for tokens in (999, 4):
        monkeypatch.setattr(packing, "SHARED_FROM", tokens)
        options = {"max_new_tokens": 4, "temperature": 1.0, "pad_id": 0, "uniforms": uniforms}
        found.append(generation.sample(model, *queries, stop=stop, **options))
    assert pack(*queries).ids.numel() == 5 + 2 + 6
    assert torch.equal(found[0].responses, found[1].responses)
    assert (found[0].logprobs - found[1].logprobs).abs().max() < 1e-6


def test_scores_are_read_at_the_last_real_token_of_each_sequence():
    model = tiny_models.reward(1)
    enable_packing(model)
    assert last_real(MASK).long().argmax(1).tolist() == [9, 6, 10, 5, 7]
    together = score_head(model)(hidden_at(model, IDS, MASK, last_real(MASK))).squeeze(1)
    alone = [
        score_sequences(model, [[]], [IDS[b][MASK[b].bool()].tolist()], pad_token_id=0)[0]
        for b in range(len(IDS))
    ]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)


def test_logits_and_hidden_states_come_row_by_row():
    model = tiny_models.causal("llama-gqa")
    where = predicting(MASK, WIDTH)
    padded = logits_at(model, IDS, MASK, where), hidden_at(model, IDS, MASK, where)
    enable_packing(model)
    packed = logits_at(model, IDS, MASK, where), hidden_at(model, IDS, MASK, where)
    for a, b in zip(packed, padded, strict=True):
        assert len(a) == int(MASK[:, -WIDTH:].sum())
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_tokens_from_which_nothing_is_predicted_are_not_computed():
    where = predicting(MASK, WIDTH)
    ends = last_real(MASK) & where.any(dim=1, keepdim=True)  # the empty response stays whole
    assert torch.equal(needed(MASK, where), MASK.bool() & ~ends)
    assert torch.equal(needed(MASK, last_real(MASK)), MASK.bool())
    model = tiny_models.causal("llama-gqa")
    enable_packing(model)
    seen = []
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    response_logprobs(model, SEQUENCES, 1.0)
    hidden_at(model, IDS, MASK, where)
    assert seen == [32 - 4, 32 - 4]


def test_gradient_checkpointing_changes_no_gradient():
    found = []
    for checkpointing in (False, True):
        model = tiny_models.causal("llama-gqa").train()
        enable_packing(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        found.append(_gradients(model, response_logprobs(model, SEQUENCES, 1.0).sum()))
    _close(*found, 1e-5)


@pytest.mark.parametrize("kind", tiny_models.PADDED)
def test_what_cannot_be_packed_keeps_padded_batches_and_says_so_once(kind, capsys):
    model = tiny_models.causal(kind)
    wanted = response_logprobs(model, SEQUENCES, 1.0)
    packing._say_once.cache_clear()
    for _ in range(2):
        pack_if_possible(model)
    assert not packs(model)
    told = [line for line in capsys.readouterr().out.splitlines() if "stay padded" in line]
    assert len(told) == 1 and type(inner(model)).__name__ in told[0]
    assert torch.equal(response_logprobs(model, SEQUENCES, 1.0), wanted)


def test_a_model_that_answers_differently_when_packed_is_found_out(monkeypatch):
    def careless(module, query, key, value, attention_mask, **kwargs):
        return packing.sdpa_attention_forward(module, query, key, value, None, **kwargs)

    monkeypatch.setitem(packing.AttentionInterface._global_mapping, "packed_sdpa", careless)
    model = tiny_models.causal("llama")
    assert "differ" in (enable_packing(model) or "")
    assert not packs(model)


def test_a_published_config_does_not_carry_our_attention(tmp_path):
    model = tiny_models.causal("llama")
    enable_packing(model)
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
