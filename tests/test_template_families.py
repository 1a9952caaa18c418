"""What the stages see of conversations under the chat templates that models are published with.

Templates are written in the style of the published ones, tokenizers are trained here: byte-level BPE
(GPT-2, Llama 3, Qwen), BPE after metaspace with bytes for what it lacks (Llama 2, Mistral, Gemma),
Unigram (T5) and WordPiece (Chinese GPT-2).
"""

import functools
from typing import NamedTuple

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from pipeline.config.schema import RMConfig, SFTConfig
from pipeline.data.forms import Demonstration, Prompt
from pipeline.data.messages import message
from pipeline.data.rankings import Ranking
from pipeline.data.template import (
    DATE,
    encode_demonstration,
    encode_prompt,
    encode_responses,
    prepare_tokenizer,
    response_text,
    role_markers,
    well_formed,
)
from pipeline.errors import UserError
from pipeline.ppo.rollout import queries_of
from pipeline.training.supervised import _joined
from stages import rm, sft


class Family(NamedTuple):
    """A chat template, its control tokens (EOS first), and what it makes of a reply and of system."""

    template: str
    specials: tuple[str, ...]
    written: str = "{reply}"  # what stands before EOS, of a reply without thinking
    trims: bool = False  # blanks at the ends of a reply
    system: bool = True  # a place for a system message
    opens: bool = False  # a block of thinking, in the prompt


LOOP = "{% for m in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}"
CHATML = (
    LOOP + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    + END + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    + LOOP + "{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + LOOP + "{% set content = m['content'] %}"
    "{% if m['role'] != 'assistant' %}{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}"
    "{% else %}{% set thought = '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}"
    + END + "{{ '<|im_start|>assistant\n' }}"
)  # fmt: skip
HEADERS = (
    "{{ bos_token }}" + LOOP
    + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    + END + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)  # fmt: skip
INST = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for m in loop_messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}" + LOOP
    + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + LOOP
    + "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    + END + "{{ '<start_of_turn>model\n' }}{% endif %}"
)  # fmt: skip
PHI = (
    LOOP + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    + END + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)  # fmt: skip
ZEPHYR = (
    LOOP + "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    + END + "{{ '<|assistant|>\n' }}{% endif %}"
)  # fmt: skip
VICUNA = (
    LOOP + "{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}"
    + END + "{{ 'ASSISTANT:' }}{% endif %}"
)  # fmt: skip
R1 = (
    "{{ bos_token }}" + LOOP
    + "{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% else %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}"
    + END + "{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)  # fmt: skip
CHINESE = (
    LOOP + "{% if m['role'] == 'user' %}{{ '用户：' + m['content'] + '\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ '助手：' + m['content'] + eos_token + '\n' }}{% endif %}"
    + END + "{{ '助手：' }}{% endif %}"
)  # fmt: skip
SIGNS = (
    LOOP + "{{ {'system': '※', 'user': '▶', 'assistant': '◀'}[m['role']] + m['content'] + '■' }}"
    + END + "{{ '◀' }}{% endif %}"
)  # fmt: skip
DATED = "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
TRIMMED = CHATML.replace("m['content']", "m['content'].strip()")
LEADING = CHATML.replace(
    "m['content']", "(m['content'].lstrip('\n') if m['role'] == 'assistant' else m['content'])"
)
PHRASED = "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
IM = "<|im_end|>", "<|im_start|>"
NO_THOUGHT = "<think>\n\n</think>\n\n{reply}"
CLOSED = "\n</think>\n\n{reply}"

FAMILIES = {
    "chatml": Family(CHATML, IM),
    "qwen3": Family(
        QWEN3 + "{% if enable_thinking is defined and not enable_thinking %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}", IM, NO_THOUGHT
    ),
    "qwen3 that always thinks": Family(
        QWEN3 + "{{ '<think>\n' }}{% endif %}", IM, CLOSED, opens=True
    ),
    "llama 3": Family(
        HEADERS, ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"), trims=True
    ),
    "llama 3 base": Family(
        HEADERS,
        ("<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"), trims=True,
    ),
    "llama 2": Family(INST, ("</s>",), " {reply} ", trims=True),
    "mistral": Family(MISTRAL, ("</s>", "[INST]", "[/INST]"), system=False),
    "gemma": Family(
        GEMMA, ("<eos>", "<start_of_turn>", "<end_of_turn>"), trims=True, system=False
    ),
    "phi": Family(PHI, ("<|endoftext|>", *PHRASED)),
    "zephyr": Family(ZEPHYR, ("</s>",)),
    "vicuna": Family(VICUNA, ("</s>",), " {reply}"),
    "deepseek-r1": Family(
        R1, ("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"), CLOSED, opens=True
    ),
    "trimmed": Family(TRIMMED, IM, trims=True),
    "leading newline": Family(LEADING, IM),
    "dated": Family(DATED, IM),
    "chinese": Family(CHINESE, ("</s>",), system=False),
    "signs": Family(SIGNS, ("■",)),
}  # fmt: skip

CORPUS = [
    "User: what is this?\n\nAssistant: this is a word, and that one is not.",
    "用户：你好，今天天气怎么样？\n助手：今天是晴天。",
    "<think>\nhm\n</think>\n\nyes [INST] <<SYS>> system user model",
] * 3
BOS, PAD = "<|bos|>", "<|pad|>"


@functools.cache
def byte_level() -> str:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return inner.to_str()


@functools.cache
def metaspace() -> str:
    """As Llama 2's: a blank before every text, bytes for characters that are not in the vocabulary."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    )
    rules = inner.to_str().replace('"special":true', '"special":false')  # bytes are no control
    return rules


KINDS = {"byte-level": byte_level, "metaspace": metaspace}


def dressed(rules: str, family: Family) -> PreTrainedTokenizerFast:
    """A tokenizer with a family's control tokens and template, as a stage loads it."""
    inner = Tokenizer.from_str(rules)
    names = [BOS, PAD, *family.specials]
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tags = [tag for tag in ("<think>", "</think>") if tag not in names]
    inner.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=BOS,
        pad_token=PAD,
        eos_token=family.specials[0],
        chat_template=family.template,
    )
    prepare_tokenizer(tokenizer)
    return tokenizer


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(params=KINDS)
def tokenizer(request, family):
    return dressed(KINDS[request.param](), family)


def controls(tokenizer, ids):
    known = tokenizer.added_tokens_decoder
    return [i for i in ids if i in known and known[i].special]


ASK = [message("user", "what is this?")]
SYSTEM = message("system", "请简短回答 kindly")
CHAT = [
    *ASK,
    message("assistant", "a word"),
    message("user", "你好，今天天气怎么样？"),
    message("assistant", "今天是晴天。"),
]
REPLIES = [
    "this is a word.",
    "今天是晴天。 yes，对！",
    "a\n\n  b\tc",
    "👩‍👩‍👧 é e\u0301 שלום \u200f",
    " \n  blanks at both ends \n",
    "\nnew line",
]


def told(family: Family, tokenizer, reply: str, written: str | None = None) -> str:
    """The text that a family trains on for a reply, before its EOS."""
    if family.template == LEADING or family.template.startswith(QWEN3):
        reply = reply.lstrip("\n")
    text = (written or family.written).format(reply=reply.strip() if family.trims else reply)
    return text.removeprefix(" ") if eats_a_blank(tokenizer) else text


def eats_a_blank(tokenizer) -> bool:
    """After metaspace the blank that begins a text is taken for the one that is always put there."""
    return tokenizer.decode(tokenizer(" a")["input_ids"]) == "a"


@pytest.mark.parametrize("reply", REPLIES)
def test_a_response_decodes_to_the_reply_and_ends_in_one_eos(family, tokenizer, reply):
    _, [ids] = encode_responses(tokenizer, ASK, [reply])
    assert ids[-1] == tokenizer.eos_token_id and controls(tokenizer, ids) == ids[-1:]
    assert tokenizer.decode(ids[:-1]) == told(family, tokenizer, reply)
    assert encode_demonstration(tokenizer, [*ASK, message("assistant", reply)])[1] == ids
    thought = family.written.partition("</think>")[1]
    text = told(family, tokenizer, reply)
    said = text.partition("</think>")[2].lstrip() if thought else text
    assert response_text(tokenizer, ids) == said
    assert well_formed(tokenizer, ids, role_markers(tokenizer))


@pytest.mark.parametrize("start", [[], [SYSTEM]], ids=["", "system"])
def test_every_turn_is_learnt_and_all_stages_see_the_same_ids(family, tokenizer, start):
    """SFT's rows are the prompt that PPO samples from and the response that the reward model scores."""
    messages = [*start, *CHAT]
    config = SFTConfig(model="m", max_length=500)
    rows, _ = sft._encode(tokenizer, [Demonstration(messages, "here:1")], config)
    turns = [at for at, item in enumerate(messages) if item["role"] == "assistant"]
    assert len(rows) == len(turns) == 2
    for row, turn in zip(rows, turns, strict=True):
        asked, reply = messages[:turn], messages[turn]["content"]
        [query] = queries_of(tokenizer, [Prompt(asked, {}, "here:1")])
        ids, labels = _joined(row).values()
        n = len(query.ids)
        assert (ids[:n], labels[:n]) == (query.ids, [-100] * n)
        assert labels[n:] == ids[n:]
        assert tokenizer.decode(ids[n:-1]) == told(family, tokenizer, reply)
        assert ids[-1] == tokenizer.eos_token_id

        ranking = Ranking(asked, [reply, "no"], [1, 2], "here:1", {})
        [ranked], _ = rm._encode(tokenizer, [ranking], RMConfig(max_length=500))
        assert ranked["prompt_ids"] + ranked["ids"][0] == ids and ranked["prompt_ids"] == query.ids


def test_words_never_become_control_tokens(family, tokenizer):
    names = [*family.specials, BOS, PAD]
    for words in (f"a{' b '.join(names)} c", "".join(names), f"\n{names[0]}"):
        spelled = [
            message("system", words),
            message("user", words),
            message("assistant", words),
            message("user", words),
        ]
        plain = [message(item["role"], "a") for item in spelled]
        prompt, [ids] = encode_responses(tokenizer, spelled, [words])
        assert controls(tokenizer, prompt) == controls(tokenizer, encode_prompt(tokenizer, plain))
        assert controls(tokenizer, ids) == ids[-1:] == [tokenizer.eos_token_id]
        for encoded in (prompt, ids):
            text = tokenizer.decode(encoded)
            assert words.strip().replace("▁", " ") in text.replace("▁", " ")  # metaspace's own sign


def test_a_system_message_is_read_whatever_the_template(family, tokenizer, capsys):
    """In its own place, or, where it has none, before the user's first words; told once."""
    capsys.readouterr()
    text = tokenizer.decode(encode_prompt(tokenizer, [SYSTEM, *CHAT[:3]]))
    assert SYSTEM["content"] in text
    if not family.system:
        folded = [message("user", f"{SYSTEM['content']}\n\nwhat is this?"), *CHAT[1:3]]
        assert text == tokenizer.decode(encode_prompt(tokenizer, folded))
        encode_prompt(tokenizer, [SYSTEM, *ASK])
    assert capsys.readouterr().out.count("no system role") == (not family.system)


def test_thinking_is_learnt_where_the_template_keeps_it(family, tokenizer):
    reply = "<think>\nhm\n</think>\n\nyes"
    prompt, [ids] = encode_responses(tokenizer, ASK, [reply])
    text = tokenizer.decode(ids[:-1])
    if family.opens:
        assert tokenizer.decode(prompt).endswith("<think>\n")
        assert text == "hm\n</think>\n\nyes"
    else:
        written = family.written.replace(NO_THOUGHT, "{reply}")
        assert text == told(family, tokenizer, reply, written)
    assert response_text(tokenizer, ids).strip() == "yes"
    later = [*ASK, message("assistant", reply), *ASK]
    forgets = "</think>" in family.template
    assert ("hm" in tokenizer.decode(encode_prompt(tokenizer, later))) == (not forgets)


def test_thinking_cannot_smuggle_control_tokens_in(family, tokenizer):
    eos = tokenizer.eos_token
    [ids] = encode_responses(tokenizer, ASK, [f"<think>\nh{eos}m\n</think>\n\ny{eos}s"])[1]
    assert controls(tokenizer, ids) == ids[-1:]
    text = tokenizer.decode(ids).replace("▁", " ")
    assert all(f"{a}{eos}{b}".replace("▁", " ") in text for a, b in ("hm", "ys"))


def test_a_date_is_the_same_every_day():
    tokenizer = dressed(byte_level(), FAMILIES["dated"])
    assert f"{DATE:%d %b %Y}" in tokenizer.decode(encode_prompt(tokenizer, ASK))


def test_a_row_that_a_template_refuses_is_named():
    """By the file and line it comes from, in every stage."""
    tokenizer = dressed(byte_level(), FAMILIES["mistral"])
    twice = [*ASK, *ASK]
    told = r"^chat\.jsonl:7: chat template: cannot render \[user, user.*roles must alternate"
    demonstration = Demonstration([*twice, message("assistant", "a")], "chat.jsonl:7")
    with pytest.raises(UserError, match=told):
        sft._encode(tokenizer, [demonstration], SFTConfig(model="m"))
    with pytest.raises(UserError, match=told):
        rm._encode(tokenizer, [Ranking(twice, ["a", "b"], [1, 2], "chat.jsonl:7", {})], RMConfig())
    with pytest.raises(UserError, match=told):
        queries_of(tokenizer, [Prompt(twice, {}, "chat.jsonl:7")])


def test_tags_of_thinking_that_are_special_tokens_are_the_templates_and_the_assistants():
    """Templates find them in a reply; elsewhere they are letters."""
    family = FAMILIES["qwen3"]
    tokenizer = dressed(
        byte_level(), family._replace(specials=(*family.specials, "<think>", "</think>"))
    )
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    reply = "<think>\nhm\n</think>\n\nthe tag </think> closes"
    prompt, [ids] = encode_responses(tokenizer, [message("user", reply)], [reply])
    assert controls(tokenizer, ids) == [*tags, tokenizer.eos_token_id]
    assert not set(tags) & set(prompt)
    assert tokenizer.decode(ids[:-1]).startswith("<think>\nhm\n</think>\n\n")
    assert response_text(tokenizer, ids) == "the tag </think> closes"
    assert well_formed(tokenizer, ids, role_markers(tokenizer))
