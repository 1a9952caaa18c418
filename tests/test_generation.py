"""Sampling: every decoder draws the same tokens, by the right probabilities, and stops where told."""

import pytest
import torch

import tiny_models
from pipeline.errors import UserError
from pipeline.models import decoding
from pipeline.models.decoding import CachedDecoder, Decoder, PackedDecoder, survivors
from pipeline.models.generation import drawn, generate, sample, stops
from pipeline.models.packing import enable_packing
from pipeline.models.tokens import left_pad

PAD, EOS = 0, 4
PROMPTS = [[2, 7, 8, 3], [2, 9, 3], [2, 5, 6, 7, 11, 3], [2, 12, 13, 3], [3], [2, 6, 6, 3]]


def run(model, uniforms=None, max_new_tokens=12, stop_tokens=(), **kwargs):
    queries, mask = left_pad(PROMPTS, PAD)
    return sample(
        model,
        queries,
        mask,
        max_new_tokens=max_new_tokens,
        temperature=kwargs.pop("temperature", 1.5),
        stop=stops(tiny_models.tokenizer(), stop_tokens),
        pad_id=PAD,
        uniforms=uniforms,
        **kwargs,
    )


@pytest.mark.parametrize("kind", tiny_models.CAUSAL)
def test_every_decoder_draws_the_same_tokens_with_the_same_logprobs(kind, monkeypatch):
    model = tiny_models.causal(kind)
    uniforms = torch.rand(len(PROMPTS), 12, generator=torch.Generator().manual_seed(1))
    uniforms[::2, 3] = uniforms[1::3, 6] = 0.0
    got = {}
    for decoder in (Decoder, CachedDecoder, None):
        with monkeypatch.context() as patch:
            if decoder is not None:
                patch.setattr("pipeline.models.generation.decoder", decoder)
            else:
                enable_packing(model)
            # whatever the model prefers, the first ids are what low numbers draw
            got[decoder] = run(model, uniforms, stop_tokens=["<user>", "<bot>", "w0", "w1"])
    slow = got[Decoder]
    assert len(set(slow.lengths.tolist())) > 1, "rows should end at different steps"
    for other in (got[CachedDecoder], got[None]):
        assert other.responses.tolist() == slow.responses.tolist()
        assert other.lengths.tolist() == slow.lengths.tolist()
        assert other.ended.tolist() == slow.ended.tolist()
        torch.testing.assert_close(other.logprobs, slow.logprobs, rtol=1e-4, atol=1e-4)


def test_a_packed_model_gets_the_packed_decoder_and_others_do_not():
    queries, mask = left_pad(PROMPTS, PAD)
    model = tiny_models.causal("llama")
    assert type(decoding.decoder(model, queries, mask, 4)) is CachedDecoder
    enable_packing(model)
    assert type(decoding.decoder(model, queries, mask, 4)) is PackedDecoder


def test_a_response_does_not_depend_on_the_others_in_its_batch():
    model = tiny_models.policy(0, torch.float64)
    enable_packing(model)
    uniforms = torch.rand(len(PROMPTS), 12, generator=torch.Generator().manual_seed(1))
    whole = run(model, uniforms)
    for i, prompt in enumerate(PROMPTS):
        ids, mask = left_pad([prompt], PAD)
        alone = sample(
            model,
            ids,
            mask,
            max_new_tokens=12,
            temperature=1.5,
            stop=stops(tiny_models.tokenizer()),
            pad_id=PAD,
            uniforms=uniforms[i : i + 1],
        )
        length = int(whole.lengths[i])
        assert alone.responses[0].tolist() == whole.responses[i, :length].tolist()
        assert whole.responses[i, length:].eq(PAD).all() and whole.logprobs[i, length:].eq(0).all()


def test_the_first_eos_ends_a_response_even_when_pad_is_eos():
    model = tiny_models.policy(3)
    queries, mask = left_pad(PROMPTS * 20, EOS)
    stop = stops(tiny_models.tokenizer(pad_is_eos=True))
    torch.manual_seed(0)
    got = sample(model, queries, mask, max_new_tokens=8, temperature=1.0, stop=stop, pad_id=EOS)
    rows = zip(got.responses.tolist(), got.lengths.tolist(), got.ended.tolist(), strict=True)
    assert 0 < got.ended.sum() < len(queries)
    for row, length, ended in rows:
        assert EOS not in row[: length - 1]
        assert ended == (row[length - 1] == EOS)
        assert ended or length == 8


@pytest.mark.parametrize("greedy", [False, True])
def test_a_model_of_no_numbers_says_so_and_nothing_else(greedy):
    model = tiny_models.policy()
    model.lm_head.weight.data[3] = float("nan")
    asked = {"max_new_tokens": 4, "greedy": greedy}
    with pytest.raises(UserError, match="LlamaForCausalLM: this model's logits are no numbers"):
        generate(model, tiny_models.tokenizer(), [[2, 7, 3]], **asked)


def test_draws_follow_the_distribution_and_never_the_impossible():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 2.0, -torch.inf]])
    uniforms = torch.linspace(0, 1, 10_001)[:-1]
    counts = drawn(logits.expand(10_000, -1), uniforms).bincount(minlength=5)
    wanted = torch.softmax(logits[0], dim=0) * 10_000
    assert (counts - wanted).abs().max() <= 1.5
    assert counts[1] == counts[4] == 0
    largest = torch.nextafter(torch.tensor([1.0]), torch.zeros(1))
    for seed in range(200):
        noise = torch.randn(1, 1000, generator=torch.Generator().manual_seed(seed))
        noise[:, -1] = -torch.inf
        assert drawn(noise, largest).item() < 999


def test_greedy_takes_the_likeliest_and_temperature_enters_the_logprobs():
    model = tiny_models.policy(0)
    once, again = run(model, greedy=True), run(model, greedy=True)
    assert torch.equal(once.responses, again.responses)
    uniforms = torch.zeros(len(PROMPTS), 1)
    cold = run(model, uniforms, max_new_tokens=1, temperature=0.5)
    warm = run(model, uniforms, max_new_tokens=1, temperature=2.0)
    queries, mask = left_pad(PROMPTS, PAD)
    with torch.no_grad():
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        logits = model(queries, attention_mask=mask.long(), position_ids=positions).logits[:, -1]
    for got, temperature in ((cold, 0.5), (warm, 2.0)):
        logp = torch.log_softmax(logits / temperature, -1).gather(1, got.responses)
        torch.testing.assert_close(got.logprobs, logp, rtol=1e-4, atol=1e-5)


def test_a_stop_string_of_several_tokens_ends_a_response_where_it_is_complete():
    model = tiny_models.policy(0, initializer_range=0.02)  # nearly uniform over 29 words
    tokenizer = tiny_models.tokenizer()
    wanted = "w3 w4"
    torch.manual_seed(0)
    answers = generate(
        model, tokenizer, PROMPTS * 100, max_new_tokens=16, stop_tokens=(wanted, "w5")
    )
    texts = [tokenizer.decode(answer.ids) for answer in answers]  # special tokens included
    for end in (wanted, "w5"):
        assert any(a.ended and text.endswith(end) for a, text in zip(answers, texts, strict=True))
    for answer, text in zip(answers, texts, strict=True):
        words = text.split()
        assert wanted not in " ".join(words[:-1]) and "w5" not in words[:-1]
        if not answer.ended:
            assert len(answer.ids) == 16 and wanted not in text


def test_a_stop_string_that_cannot_be_spelled_is_an_error():
    with pytest.raises(UserError, match="cannot spell 'xyzzy'"):
        stops(tiny_models.tokenizer(), ["xyzzy"])


def test_forced_lengths_are_kept_to():
    lengths = torch.tensor([1, 5, 3, 12, 2, 7])
    got = run(tiny_models.policy(0), lengths=lengths)
    assert got.lengths.tolist() == lengths.tolist()
    assert got.ended.all()


def test_the_last_rows_fill_the_gaps_and_the_others_stay():
    ended = torch.tensor([False, True, False, False, True, False, False])
    order = survivors(ended)
    assert sorted(order.tolist()) == [0, 2, 3, 5, 6]
    assert [i for i, row in enumerate(order.tolist()) if i == row] == [0, 2, 3]
