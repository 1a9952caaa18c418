"""Loading the four models: no dropout, heads drawn as they should be, padding apart from EOS."""

import math

import pytest
import torch

import tiny_models
from pipeline.errors import UserError
from pipeline.models.forward import score_head
from pipeline.models.loading import (
    disable_dropout,
    load_policy,
    load_reward,
    load_tokenizer,
    reward_from_policy,
)


@pytest.mark.parametrize(
    "model",
    [
        tiny_models.policy(0, attention_dropout=0.5),
        tiny_models.gpt2(0, attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5),
        tiny_models.seq2seq("t5", dropout_rate=0.5),
        tiny_models.seq2seq("bart", dropout=0.5, activation_dropout=0.5),
        tiny_models.seq2seq("m2m100", encoder_layerdrop=0.5, decoder_layerdrop=0.5),
    ],
    ids=["a float in its attention", "dropout modules", "t5", "bart", "layers left out"],
)
def test_no_kind_of_dropout_is_left_and_the_config_has_none_either(model):
    ids = torch.tensor([[2, 7, 8, 3, 10]])
    inputs = {"input_ids": ids}
    inputs |= {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}

    def steady(model) -> bool:
        """Five passes: a layer of two may stay in by chance."""
        return len({model(**inputs).logits.sum().item() for _ in range(5)}) == 1

    assert not steady(model.train())
    assert steady(disable_dropout(model))
    assert steady(type(model)(model.config).train())


def test_a_fresh_reward_head_has_the_small_spread_of_its_source(tmp_path):
    """std 1/sqrt(d + 1), arXiv 2403.17031."""
    tiny_models.policy(0, hidden_size=1024, intermediate_size=8).save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    torch.manual_seed(0)
    head = score_head(reward_from_policy(tmp_path, load_tokenizer(tmp_path)))
    assert head.weight.shape == (1, 1024)
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.1)


def test_a_model_with_several_outputs_is_no_reward_model(tmp_path):
    tiny_models.reward(0).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    assert load_reward(tmp_path).config.num_labels == 1
    two = config.replace('"LABEL_0"', '"LABEL_0", "1": "LABEL_1"')
    two = two.replace('"LABEL_0": 0', '"LABEL_0": 0, "LABEL_1": 1')
    (tmp_path / "config.json").write_text(two)
    with pytest.raises(UserError):
        load_reward(tmp_path)


def test_sampling_rules_that_a_model_ships_with_are_dropped(tmp_path):
    model = tiny_models.policy(0)
    model.generation_config.update(top_k=5, do_sample=True, temperature=0.1)
    model.save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    loaded = load_policy(tmp_path, load_tokenizer(tmp_path)).generation_config
    assert loaded.top_k in (None, 50) and loaded.temperature in (None, 1.0)
    assert not loaded.do_sample


def test_padding_gets_a_token_of_its_own(tmp_path):
    tiny_models.tokenizer(pad_is_eos=True).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize("model", [tiny_models.policy(), tiny_models.seq2seq("bart")])
def test_a_folder_without_a_tokenizer_is_refused(model, tmp_path):
    """transformers would make one of five tokens up for a BART."""
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="there is no tokenizer; save the model's own there"):
        load_tokenizer(tmp_path)
