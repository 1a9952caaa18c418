"""Texts in all scripts: stops, cut-off characters, metrics, splits, and the pages and lines they stand on."""

import io
import itertools
import unicodedata

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import small_run
from pipeline.commands import chat
from pipeline.data.forms import Demonstration
from pipeline.data.messages import message
from pipeline.data.splits import normal_form, split_by_prompt
from pipeline.data.template import encode_responses, prepare_tokenizer, response_text
from pipeline.evaluation import metrics, report
from pipeline.models.generation import stops
from test_summary import judged
from test_template_families import ASK, CORPUS, FAMILIES, KINDS, dressed


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return dressed(KINDS[request.param](), FAMILIES["chinese"])


def spellings(tokenizer, text: str) -> list[list[int]]:
    """A text's own tokens, and one token for each byte."""
    names = tokenizer.get_vocab()
    if "<0x00>" in names:
        spelled = [names[f"<0x{byte:02X}>"] for byte in text.encode()]
    else:
        encoder = pre_tokenizers.ByteLevel(add_prefix_space=False)
        spelled = [names[sign] for piece, _ in encoder.pre_tokenize_str(text) for sign in piece]
    return [tokenizer.encode(text, add_special_tokens=False), spelled]


# --- stop strings, and responses that are cut off ---------------------------------------------------


@pytest.mark.parametrize("string", ["。", "用户：", "🛑", "Конец", "سؤال:", "\n\n"])
def test_a_stop_string_is_found_whatever_tokens_spell_it(tokenizer, string):
    """Byte for byte too, and after other bytes that a look at the last tokens alone would halve."""
    stop = stops(tokenizer, [string])
    before = [[], *spellings(tokenizer, "好😀é"), *spellings(tokenizer, "a")]
    for text, spelled in itertools.product(before, spellings(tokenizer, string)):
        ids = [*text, *spelled]
        hits = [bool(stop.hits(torch.tensor([ids[:n]]))) for n in range(1, len(ids) + 1)]
        assert hits[-1]
        assert not any(hits[:-1])


@pytest.mark.parametrize("character", ["好", "😀", "é", "ש"])
def test_a_response_cut_in_the_middle_of_a_character_ends_before_it(tokenizer, character):
    for text in ("", "今天", "ok "):
        for start in spellings(tokenizer, text):
            whole = [*start, *spellings(tokenizer, character)[1]]
            for cut in range(1, len(character.encode())):
                assert response_text(tokenizer, whole[:-cut]) == text.lstrip()
            assert response_text(tokenizer, whole) == text + character
            # what is no cut is shown as it is: the model said a part of a character and ended
            ended = [*whole[:-1], tokenizer.eos_token_id]
            assert response_text(tokenizer, ended).endswith("\ufffd")


def unigram(**options):
    """As T5's: compatibility forms become ordinary ones, and line breaks blanks."""
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    settings = {"special_tokens": ["<unk>", "</s>"], "unk_token": "<unk>", "show_progress": False}
    inner.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=150, **settings))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", **options
    )


def word_piece():
    """As BERT's, which Chinese GPT-2s were trained with."""
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=False)
    settings = {"special_tokens": ["[UNK]", "[SEP]"], "show_progress": False}
    inner.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=150, **settings))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[SEP]", unk_token="[UNK]")


@pytest.mark.parametrize(
    ("make", "reply", "said"),
    [
        (unigram, "this is a word , and that", "this is a word , and that"),
        (unigram, "今天天气怎么样？", "今天天气怎么样?"),
        (word_piece, "This is a word , 今天。", "this is a word , 今 天 。"),
    ],
)
def test_what_a_tokenizer_itself_changes_is_all_that_changes(make, reply, said):
    """Nothing is mended in its text; metrics heed neither blanks in Chinese nor the width of signs."""
    tokenizer = make(clean_up_tokenization_spaces=True) if make is unigram else make()
    prepare_tokenizer(tokenizer)
    _, [ids] = encode_responses(tokenizer, ASK, [reply])
    assert response_text(tokenizer, ids) == said
    assert metrics.exact_match(said, reply.replace("This", "this"))


# --- metrics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("安娜在2001年，去了New York。", "安 娜 在 2001 年 , 去 了 New York 。"),
        ("《论语》3.5元", "《 论 语 》 3.5 元"),
        ("他说“你好！”", "他 说 “ 你 好 ! ”"),
        ("用户：hi", "用 户 : hi"),
        ("ＡＢＣ１２３", "ABC123"),
        ("コーヒーﾊﾞｰ", "コ ー ヒ ー バ ー"),
        ("한국어 문장.", "한국어 문장."),
        ("it's a dog's. don't", "it's a dog's. don't"),
        ("x² ½ ①", "x² ½ ①"),
        ("\u3000全角 空格", "全 角 空 格"),
        ("𠮷野家", "𠮷 野 家"),
        ("مرحبا بكم", "مرحبا بكم"),
    ],
)
def test_tokens_of_texts_with_and_without_blanks(text, tokens):
    """CJK characters and the signs beside them one by one, all else by blanks; full width is ordinary."""
    assert metrics.tokens(text) == tokens.split()


def test_overlap_of_chinese_is_of_characters():
    # common: 今 天 是 of 4 predicted, of 5 wanted
    assert metrics.token_overlap("今天是雨", "今天是晴天").f1 == pytest.approx(2 * 3 / 9)
    assert metrics.exact_match("答案：3，对吗？", "答案:3, 对吗?")
    assert metrics.exact_match("约 3.5 km,对吗", "约3.5 km, 对吗")
    assert not metrics.exact_match("x²", "x2")


def test_exact_match_is_of_text_however_accents_are_encoded():
    """Case and all else count; composed and decomposed letters are one text by Unicode's own rule."""
    composed, apart = (unicodedata.normalize(form, "Caffè über ắ 가") for form in ("NFC", "NFD"))
    assert composed != apart and metrics.exact_match(composed, apart)
    assert metrics.token_overlap(composed, apart).f1 == 1
    assert not metrics.exact_match("Caffe", "Caffè")
    assert not metrics.exact_match("caffè", "Caffè")
    family = "👩\u200d👩\u200d👧"
    assert metrics.exact_match(family, family) and not metrics.exact_match(family, "👩👩👧")


def test_prompts_that_differ_in_the_encoding_of_accents_are_on_one_side():
    """As they would be for a reader; compatibility forms and joined emoji are other texts."""
    same = [unicodedata.normalize(form, "Où est le café ? 가") for form in ("NFC", "NFD")]
    assert same[0] != same[1] and normal_form(same[0]) == normal_form(same[1])
    assert normal_form("x²") != normal_form("x2")
    assert normal_form("👩\u200d👧") != normal_form("👩👧")
    items = [Demonstration([*_ask(text), message("assistant", "a")], "") for text in same * 5]
    others = [Demonstration([*_ask(f"q{n}"), message("assistant", "a")], "") for n in range(10)]
    for seed in range(5):
        training, held_out = split_by_prompt(items + others, 0.3, seed)
        assert sum(item in training for item in items) in (0, 10)
        assert len(training) + len(held_out) == 20


def _ask(text: str) -> list[dict[str, str]]:
    return [message("user", text)]


# --- pages and lines --------------------------------------------------------------------------------

HOSTILE = "\u202eabc\u2067 \u2069\u2069\x1b[2J\r x"


def test_the_page_gives_each_text_its_own_direction(tmp_path):
    """By its first letter, line by line; what a text opens ends with its own block."""
    run = small_run.make_run(tmp_path)
    answer = {"response": f"مرحبا\nhello {HOSTILE}", "judge": 1.0, "ended": True}
    row = {"prompt": "שלום 你好", "groups": {"family": "שלום"}, "answers": {"sft": answer}}
    judged(run, models={"sft": {}}, comparisons={}, config={"samples": 1, "split": "test"})
    small_run.write_jsonl(run / "eval" / "test_samples.jsonl", [row])
    page = report.write_report(run).read_text(encoding="utf-8")
    assert page.count('<div class="text" dir="auto">') == page.count('class="text"') >= 2
    assert "unicode-bidi: plaintext" in page and "<bdi>שלום</bdi>" in page
    assert "שלום 你好</div>" in page and "مرحبا\nhello" in page


def chatted(prompt: str, *texts: str) -> list[str]:
    console = Console(file=io.StringIO(), width=40)
    console.print(chat.table(prompt, [("sft", text, True, 1.5) for text in texts]))
    return console.file.getvalue().splitlines()


def test_chat_isolates_lines_that_run_from_right_to_left():
    """The cells beside them, and the digits of the reward, stay where they are."""
    lines = chatted("q", "שלום עולם " * 5)
    spoken = [line for line in lines if "שלום" in line]
    assert len(spoken) > 1, "the text should be folded"
    for line in spoken:
        assert line.index("\u2068") < line.index("ש") < line.index("\u2069")
        assert line.count("\u2068") == line.count("\u2069") == 1
        assert cell_len(line) == cell_len(lines[-1])
    assert "1.50" in spoken[0].partition("\u2069")[2]
    assert "\u2068" not in "".join(chatted("q", "hello 你好"))


def test_no_control_of_a_response_or_prompt_reaches_the_terminal():
    said = "".join(chatted(f"p {HOSTILE}", HOSTILE, f"שלום {HOSTILE}"))
    assert not set("\u202e\u2067\x1b\r") & set(said)
    assert said.count("\u2069") == said.count("\u2068") >= 1
    assert "\ufffd[2J" in said
