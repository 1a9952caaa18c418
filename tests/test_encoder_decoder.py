"""Encoder-decoders: their passes against stock ones, what their decoders read first, their trainers."""

import copy
import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import (
    AutoConfig,
    AutoModel,
    MarianTokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    TrainerCallback,
)

import tiny_models
from pipeline.config.evaluation import EvalConfig
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import Lora, SFTConfig
from pipeline.data.template import (
    encode_demonstration,
    encode_prompt,
    prepare_tokenizer,
    response_text,
)
from pipeline.errors import UserError
from pipeline.evaluation import likelihoods
from pipeline.models import loading
from pipeline.models.adapters import add_lora
from pipeline.models.decoding import decoder
from pipeline.models.encoder_decoder import set_decoder_prefix
from pipeline.models.forward import response_logprobs, response_scores, score_sequences
from pipeline.models.generation import generate, sample, stops
from pipeline.models.loading import load_policy, load_reward, load_tokenizer, reward_from_policy
from pipeline.models.scorer import EncoderDecoderScorer
from pipeline.models.sequences import Sequences
from pipeline.models.tokens import left_pad, mask_from_lengths
from pipeline.ppo import build
from pipeline.training.supervised import check_packing, sft_trainer

PROMPTS = [[7, 8, 4], [9, 10, 11, 12, 13, 4], [14, 4], [15, 16, 17, 4]]
RESPONSES = [[10, 11, 12, 4], [4], [14, 15, 16, 17, 18], [20, 4]]


def sequences() -> Sequences:
    return Sequences.of(PROMPTS, RESPONSES, 0)


@pytest.mark.parametrize("kind", tiny_models.SEQ2SEQ)
@torch.no_grad()
def test_logprobs_are_those_of_generate(kind):
    model = tiny_models.seq2seq(kind)
    ids, mask = Sequences.of(PROMPTS, PROMPTS, 0).responses, None
    mask = mask_from_lengths(torch.tensor([len(p) for p in PROMPTS]), ids.shape[1])
    torch.manual_seed(1)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        do_sample=True,
        top_k=0,
        max_new_tokens=8,
        output_logits=True,
        return_dict_in_generate=True,
    )
    skipped = len(model.config.decoder_prefix)
    tokens, logits = out.sequences[:, skipped:], torch.stack(out.logits, dim=1)[:, skipped - 1 :]
    theirs = torch.log_softmax(logits, dim=-1).gather(2, tokens[..., None]).squeeze(2)
    ends = (tokens == 4).int().argmax(1) + 1
    lengths = torch.where((tokens == 4).any(1), ends, tokens.shape[1])
    real = mask_from_lengths(lengths, tokens.shape[1])
    queries, query_mask = left_pad(PROMPTS, 0)
    ours = response_logprobs(model, Sequences(queries, query_mask, tokens, real), 1.0)
    torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-5)
    assert ours[~real].eq(0).all() and ours[real].std() > 0.3


@pytest.mark.parametrize("kind", [*tiny_models.SEQ2SEQ, "bart-lora", "t5-lora"])
@torch.no_grad()
def test_padding_and_company_change_nothing_and_sampling_agrees(kind):
    model = tiny_models.seq2seq(kind.removesuffix("-lora"))
    if kind.endswith("-lora"):
        model = add_lora(model, Lora(r=2), "CAUSAL_LM")
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)  # zero at first, which would hide it
    together = response_logprobs(model, sequences(), 0.7)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = response_logprobs(model, Sequences.of([prompt], [response], 0), 0.7)[0]
        torch.testing.assert_close(together[i, : len(response)], alone, rtol=1e-5, atol=1e-5)
    ids, mask = left_pad(PROMPTS * 4, 0)
    uniforms = torch.rand(16, 12, generator=torch.Generator().manual_seed(2))
    stop = stops(tiny_models.tokenizer(), ("w4", "w6", "w9", "w20"))
    known = {"max_new_tokens": 12, "temperature": 0.7, "stop": stop, "pad_id": 0}
    drawn = sample(model, ids, mask, **known, uniforms=uniforms)
    assert len(set(drawn.lengths.tolist())) > 2, "rows must end at different times"
    real = mask_from_lengths(drawn.lengths, drawn.responses.shape[1])
    s = Sequences(ids, mask, drawn.responses, real)
    torch.testing.assert_close(drawn.logprobs, response_logprobs(model, s, 0.7), rtol=0, atol=5e-5)
    alone = sample(model, *left_pad([PROMPTS[0]], 0), **known, uniforms=uniforms[:1])
    n = int(alone.lengths[0])
    assert drawn.responses[0, :n].tolist() == alone.responses[0, :n].tolist()


@pytest.mark.parametrize("kind", tiny_models.SEQ2SEQ)
@torch.no_grad()
def test_a_response_with_padding_s_token_in_it_is_one_text_token_by_token_and_whole(kind):
    """It may be sampled like any other, and M2M100 would not count it among the places."""
    model, response = tiny_models.seq2seq(kind), [10, 0, 11, 0, 12, 4]
    decode = decoder(model, *left_pad(PROMPTS[:1], 0), len(response))
    logits = [decode.start(), *(decode.step(torch.tensor([token])) for token in response[:-1])]
    found = torch.log_softmax(torch.cat(logits), dim=-1).gather(1, torch.tensor(response)[:, None])
    whole = response_logprobs(model, Sequences.of(PROMPTS[:1], [response], 9), 1.0)
    torch.testing.assert_close(found.T, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", tiny_models.SEQ2SEQ)
def test_a_reward_model_scores_the_end_of_what_its_decoder_reads(kind, tmp_path):
    tiny_models.seq2seq(kind).save_pretrained(tmp_path / "sft")
    tokenizer = tiny_models.tokenizer()
    tokenizer.save_pretrained(tmp_path / "sft")
    torch.manual_seed(3)
    model = reward_from_policy(tmp_path / "sft", tokenizer)
    model.config.reward_bias = 0.25
    model.save_pretrained(tmp_path / "rm")
    trunk = AutoModel.from_pretrained(tmp_path / "sft")  # what stock classes make of the policy
    expected = []
    with torch.no_grad():
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            ids = torch.tensor([model.config.decoder_prefix + response])
            read = trunk(input_ids=torch.tensor([prompt]), decoder_input_ids=ids).last_hidden_state
            expected.append(float(model.score(read[0, -1])) - 0.25)
    loaded = load_reward(tmp_path / "rm")
    assert score_sequences(loaded, PROMPTS, RESPONSES, 0) == pytest.approx(expected, abs=1e-5)
    assert loaded(sequences()).tolist() == pytest.approx(expected, abs=1e-5)
    values = response_scores(loaded, sequences())
    assert values.shape == (4, 5) and values[1, 1:].eq(0).all() and values[0, :4].ne(0).all()
    assert type(loaded) is EncoderDecoderScorer
    assert AutoConfig.from_pretrained(tmp_path / "rm").architectures == ["EncoderDecoderScorer"]


# --- what a decoder reads before the response -----------------------------------------------------

PIECES = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
PIECES += [(piece, -1.0) for piece in "▁a ▁hello ▁world ▁hallo ▁welt ▁".split()]


@pytest.mark.parametrize(
    ("kind", "encoder", "start"),
    [
        (MBartTokenizer, "▁hello </s> en_XX", ["de_DE"]),
        (MBart50Tokenizer, "en_XX ▁hello </s>", ["</s>", "de_DE"]),
    ],
)
def test_languages_go_where_a_model_expects_them(kind, encoder, start):
    tokenizer = kind(vocab=PIECES, src_lang="en_XX", tgt_lang="de_DE")
    model = tiny_models.seq2seq("mbart", vocab_size=len(tokenizer), decoder_start_token_id=2)
    model.config.decoder_prefix = None
    set_decoder_prefix(model, tokenizer)
    assert tokenizer.convert_ids_to_tokens(model.config.decoder_prefix) == start
    prepare_tokenizer(tokenizer, encoder_decoder=True)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "hello"}])
    assert " ".join(tokenizer.convert_ids_to_tokens(prompt)) == encoder
    told = model.generation_config
    assert [told.decoder_start_token_id, told.forced_bos_token_id] == [
        *model.config.decoder_prefix,
        None,
    ][:2]
    tokenizer.tgt_lang = None  # what was noted stays, and is not asked for again
    set_decoder_prefix(model, tokenizer)
    assert tokenizer.convert_ids_to_tokens(model.config.decoder_prefix) == start
    model.config.decoder_prefix = None
    with pytest.raises(UserError, match="target_language"):
        set_decoder_prefix(model, tokenizer)


@pytest.mark.parametrize("name", ["source_language", "target_language"])
@pytest.mark.parametrize("kind", [MBartTokenizer, MBart50Tokenizer, NllbTokenizer])
def test_a_language_that_a_tokenizer_does_not_have_is_refused(kind, name, tmp_path):
    if kind is NllbTokenizer:
        kind = functools.partial(kind, merges=[])
    table = {piece: i for i, (piece, _) in enumerate(PIECES)}
    tokenizer = kind(vocab=table if isinstance(kind, functools.partial) else PIECES)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no language klingon; it has .*deu_Latn|de_DE"):
        load_tokenizer(tmp_path, **{name: "klingon"})
    tiny_models.tokenizer().save_pretrained(tmp_path / "none")
    with pytest.raises(UserError, match="has no languages: leave out klingon"):
        load_tokenizer(tmp_path / "none", **{name: "klingon"})


@pytest.mark.parametrize("words", ["{{ message['content'] }}", "{{ 'always this' }}"])
def test_a_template_without_the_reply_is_refused(words, tmp_path):
    template = "{% for message in messages %}{% if message['role'] == 'user' %}" + words
    (tmp_path / "t.jinja").write_text(template + "{% endif %}{% endfor %}")
    with pytest.raises(UserError, match="leaves out the assistant's words"):
        prepare_tokenizer(tiny_models.tokenizer(), tmp_path / "t.jinja")


def test_two_tables_of_embeddings_do_not_grow():
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_tokens(["w99"])
    for kind in tiny_models.SEQ2SEQ:
        loading.fit_tokenizer(tiny_models.seq2seq(kind), tokenizer)
    apart = tiny_models.seq2seq("bart", tie_word_embeddings=False)
    with pytest.raises(
        UserError, match="a table of 29 embeddings each, which cannot grow to the 30"
    ):
        loading.fit_tokenizer(apart, tokenizer)


def test_a_text_that_a_reward_model_has_no_places_for_is_told():
    for model, response in ((tiny_models.seq2seq_reward("bart"), 63), (tiny_models.reward(), 24)):
        prompt = [7] * 41
        assert len(score_sequences(model, [prompt], [[8] * (response - 1)], 0)) == 1
        with pytest.raises(UserError, match=f"a reward model for 64 tokens, and 41 and {response}"):
            score_sequences(model, [prompt], [[8] * response], 0)


def test_a_response_that_is_cut_off_leaves_a_place_for_the_end_that_is_scored():
    model, tokenizer = tiny_models.seq2seq("bart"), tiny_models.tokenizer()
    torch.manual_seed(0)
    responses = generate(model, tokenizer, PROMPTS * 8, max_new_tokens=200)
    longest = max(len(response.ids) for response in responses)
    assert longest == 61 and not all(response.ended for response in responses)
    scored = [[*r.ids, *([] if r.ended else [4])] for r in responses]
    assert len(score_sequences(tiny_models.seq2seq_reward("bart"), PROMPTS * 8, scored, 0)) == 32


def test_a_tokenizer_of_two_languages_cuts_a_reply_by_the_one_that_is_written(tmp_path):
    texts = {"source": "hello world good morning", "target": "hallo welt guten morgen"}
    vocabulary = {"</s>": 0, "<unk>": 1}
    for side, text in texts.items():
        (tmp_path / "text").write_text("\n".join([text] * 20))
        SentencePieceTrainer.train(
            input=str(tmp_path / "text"),
            model_prefix=str(tmp_path / side),
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        pieces = SentencePieceProcessor(model_file=str(tmp_path / f"{side}.model"))
        for i in range(3, pieces.get_piece_size()):
            vocabulary.setdefault(pieces.id_to_piece(i), len(vocabulary))
    (tmp_path / "vocab.json").write_text(json.dumps({**vocabulary, "<pad>": len(vocabulary)}))
    tokenizer = MarianTokenizer(
        source_spm=str(tmp_path / "source.model"),
        target_spm=str(tmp_path / "target.model"),
        vocab=str(tmp_path / "vocab.json"),
    )
    prepare_tokenizer(tokenizer, encoder_decoder=True)
    talk = [("user", "hello world"), ("assistant", "guten morgen")]
    prompt, response = encode_demonstration(
        tokenizer, [{"role": role, "content": words} for role, words in talk]
    )
    assert prompt == tokenizer("hello world")["input_ids"]
    assert response == tokenizer(text_target="guten morgen")["input_ids"]
    assert response != tokenizer("guten morgen")["input_ids"], "both languages cut it alike"
    assert response_text(tokenizer, response) == "guten morgen"


def test_an_encoder_reads_the_words_and_a_decoder_writes_the_reply():
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = None
    prepare_tokenizer(tokenizer, encoder_decoder=True)
    talk = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5 w6")]
    messages = [{"role": role, "content": words} for role, words in talk]
    prompt, response = encode_demonstration(tokenizer, messages)
    assert tokenizer.convert_ids_to_tokens(prompt) == "w1 w2 <end> w3 <end> w4 <end>".split()
    assert tokenizer.convert_ids_to_tokens(response) == "w5 w6 <end>".split()
    assert encode_prompt(tokenizer, messages[:-1]) == prompt


# --- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_step_of_supervised_training_is_the_same_however_the_batch_is_cut(kind, tmp_path):
    rows = [{"prompt": p, "response": r} for p, r in zip(PROMPTS * 2, RESPONSES * 2, strict=True)]
    gradients, losses = [], []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})

    for micro in (8, 1, 4):
        config = SFTConfig(
            model="none",
            data={"path": "none"},
            batch_size=8,
            micro_batch_size=micro,
            max_steps=1,
            learning_rate=1e-2,
            warmup_ratio=0,
            max_grad_norm=1e9,
        )
        model = tiny_models.seq2seq(kind)
        work = tmp_path / str(micro)
        trainer = sft_trainer(config, model, tiny_models.tokenizer(), rows, rows[:3], work)
        trainer.add_callback(Keep())
        before = copy.deepcopy(model)
        trainer.evaluate()  # a stage measures before it trains, which counts nowhere else
        trainer.train()
        row = next(row for row in trainer.state.log_history if "loss" in row)
        with torch.no_grad():
            logprobs = response_logprobs(before, sequences(), 1.0)
            after = response_logprobs(model, sequences(), 1.0)[:3]
        assert row["loss"] == pytest.approx(-float(logprobs.sum()) / 12, rel=1e-5)
        assert 0 <= row["mean_token_accuracy"] <= 1
        losses.append(trainer.evaluate()["eval_loss"])
        assert losses[-1] == pytest.approx(-float(after.sum()) / 10, rel=1e-5)
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-5)


# --- what does not fit is told in one line, before a weight is read -----------------------------------


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A BART's folder, and no way to read weights."""
    tiny_models.seq2seq("bart").save_pretrained(tmp_path / "bart")
    tiny_models.tokenizer().save_pretrained(tmp_path / "bart")

    def unread(*args, **kwargs):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(loading, "_load_weights", unread)
    return tmp_path / "bart"


def renamed(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["BartModel"]}, "a BartModel, which does not predict the next token"),
        ({"architectures": ["BartForSequenceClassification"]}, "does not predict the next token"),
        ({"architectures": ["T5EncoderModel"], "model_type": "t5"}, "a T5EncoderModel, which does"),
        ({"architectures": ["EncoderDecoderScorer"]}, "a EncoderDecoderScorer, which does not"),
        (
            {"model_type": "whisper"},
            "whisper is none of the encoder-decoders that are known to work",
        ),
        ({"vocab_size": 20}, "a vocabulary of 20, and a tokenizer of 29 words"),
    ],
    ids=str,
)
def test_a_policy_of_another_architecture(saved, changes, told, monkeypatch):
    tokenizer = load_tokenizer(saved)
    monkeypatch.setattr(type(tokenizer), "get_added_vocab", lambda self: {})
    with pytest.raises(UserError, match=told) as refused:
        load_policy(renamed(saved, **changes), tokenizer)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["BartForSequenceClassification"]}, "names EncoderDecoderScorer"),
        ({"architectures": ["BartForConditionalGeneration"]}, "names EncoderDecoderScorer"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "is_encoder_decoder": False},
         "a LlamaForCausalLM, which has no score"),
    ],
    ids=["stock classifier", "policy", "causal"],
)  # fmt: skip
def test_a_reward_model_of_another_architecture(saved, changes, told):
    with pytest.raises(UserError, match=told):
        load_reward(renamed(saved, **changes))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"ptx_coef": 1.0, "ptx_data": {"path": "none"}}, "ptx_data: .* is an encoder-decoder"),
        ({"vllm": {}, "old_logprobs": "recompute"}, "vllm: .* is an encoder-decoder"),
        ({"rewards": [{"model": "BART"}]}, "names EncoderDecoderScorer"),
    ],
    ids=["ptx", "vllm", "reward"],
)
def test_what_ppo_cannot_do_with_it(saved, keys, told, monkeypatch):
    monkeypatch.setattr(build, "require_vllm", lambda: None)
    words = json.loads(json.dumps(keys).replace("BART", str(saved)))
    config = PPOConfig(prompts={"path": "none"}, **{"rewards": [{"function": "a:b"}], **words})
    with pytest.raises(UserError, match=told):
        build.build_ppo(config, saved)


@pytest.mark.parametrize("lost", ["encoder.layers.1.fc2.weight", "decoder.layers.0.fc1.weight"])
def test_a_weight_that_a_file_lacks_is_named_and_not_drawn(lost, tmp_path):
    tiny_models.seq2seq("bart").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    [key] = [name for name in weights if name.endswith(lost)]
    del weights[key]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"its weights lack {key}"):
        load_policy(tmp_path)


def test_packing_is_refused_in_one_line():
    with pytest.raises(UserError, match="packing: .* is an encoder-decoder"):
        check_packing(tiny_models.seq2seq("t5"))


def test_a_text_by_itself_has_no_likelihood():
    config = EvalConfig(prompts={"path": "none"}, pretraining={"path": "none"})
    with pytest.raises(UserError, match="eval: pretraining: an encoder-decoder"):
        likelihoods.check_texts(config, {"sft": tiny_models.seq2seq("bart")})
