"""Special tokens that people's words spell out: text there, for only the template writes the tokens.

A tokenizer makes its end token of the letters `<|endoftext|>` wherever they stand, and an article about
tokenizers would end in the middle. So the words are marked before the template is rendered, and where a
mark is found the rendering is read by a twin of the tokenizer that knows its special tokens by other names.
"""

import contextlib
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.data.messages import THINKING_BLOCK, Message, message
from pipeline.errors import UserError
from pipeline.process.progress import say

_MARK = "\U0010ffff"  # no character: Unicode keeps it out of texts, and `_spelled` out of the rest


def marked(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    """The messages, with a mark in the place of every special token that their words spell.

    The tags of the assistant's thinking, a block at a reply's start, are no words: templates look for
    them, and with some tokenizers they are special tokens.
    """
    return [message(item["role"], _words_spelled(tokenizer, item)) for item in messages]


def _words_spelled(tokenizer: Any, item: Message) -> str:
    words, block = item["content"], THINKING_BLOCK.match(item["content"])
    if item["role"] != "assistant" or not block:
        return _spelled(tokenizer, words)
    thought, said = _spelled(tokenizer, block[1]), _spelled(tokenizer, words[block.end() :])
    return f"{words[: block.start(1)]}{thought}</think>{said}"


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that no template writes, such as a document: no special token among them."""
    return token_ids(tokenizer, _spelled(tokenizer, text))


def _spelled(tokenizer: Any, words: str) -> str:
    pattern, numbers = _specials(tokenizer, _state(tokenizer))
    words = words.replace(_MARK, "\ufffd")  # a mark of theirs would pass for one of ours
    return pattern.sub(lambda m: f"{_MARK}{numbers[m[0]]}{_MARK}", words)


def token_ids(tokenizer: Any, text: str, reply: bool = False) -> list[int]:
    """Ids of a rendering of marked messages; the template has written BOS where there is one.

    A `reply` is cut by the pieces of the language that is written, where a tokenizer has two (Marian).
    """
    if _MARK not in text:
        written = reply and hasattr(tokenizer, "spm_target")
        given = {"text_target" if written else "text": text}
        return list(tokenizer(**given, add_special_tokens=False)["input_ids"])
    pattern, numbers = _specials(tokenizer, _state(tokenizer))
    names = list(numbers)
    renamed = pattern.sub(lambda m: _other_name(m[0]), text)
    spelled = re.sub(f"{_MARK}(\\d+){_MARK}", lambda m: names[int(m[1])], renamed)
    return list(_twin(tokenizer, _state(tokenizer)).encode(spelled, add_special_tokens=False).ids)


def around(tokenizer: Any, target: bool = False) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text; `target`: one that a decoder writes."""
    given = {"text_target" if target else "text": "a"}
    whole = tokenizer(**given)["input_ids"]
    bare = tokenizer(**given, add_special_tokens=False)["input_ids"]
    at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:at], whole[at + len(bare) :]


def has_special(tokenizer: Any, text: str) -> bool:
    """Whether a rendering of marked messages has a special token, of the template's then."""
    return _specials(tokenizer, _state(tokenizer))[0].search(text) is not None


def special_ids(tokenizer: Any) -> dict[str, int]:
    """The special tokens, by name; transformers' own list may lack some that decoding leaves out."""
    names = list(_specials(tokenizer, len(tokenizer))[1])
    return dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))


def tell_spelled(what: str, tokenizer: Any, texts: Iterable[str]) -> None:
    """Say once how many special tokens the texts spell, if any."""
    pattern, _ = _specials(tokenizer, _state(tokenizer))
    found = Counter(name for text in texts for name in pattern.findall(text))
    if found:
        names = ", ".join(sorted(found)[:5])
        say(
            f"{what}: special tokens are spelled {found.total()} times ({names}); read as plain text"
        )


def tell_unknown(what: str, tokenizer: Any, rows: Iterable[Sequence[int]]) -> None:
    """Say how many tokens are the unknown one, which stands for whatever a tokenizer cannot spell."""
    unknown = tokens = 0
    for row in map(list, rows):
        unknown, tokens = unknown + row.count(tokenizer.unk_token_id), tokens + len(row)
    if unknown and tokenizer.unk_token_id != tokenizer.eos_token_id:
        say(
            f"{what}: {unknown} of {tokens} tokens are {tokenizer.unk_token}: this tokenizer cannot spell "
            "some of the text: nobody can learn it, and its perplexity says little"
        )


def _other_name(token: str) -> str:
    return f"{_MARK}{token}"


@functools.lru_cache(maxsize=8)
def _specials(tokenizer: Any, state: Any) -> tuple[re.Pattern[str], dict[str, int]]:
    """A pattern of the special tokens, the longest that fits first, and their numbers in it.

    Some tokenizers hold the tokens that a template writes around messages as ordinary added ones.
    """
    added = {str(t): t.special for t in tokenizer.added_tokens_decoder.values()}
    found = {name for name, special in added.items() if special} | set(tokenizer.all_special_tokens)
    if added.keys() - found:
        around = _around(tokenizer)
        found |= {name for name in added if name in around and re.search(r"[^\w\s]", name)}
    names = sorted(found, key=lambda name: (-len(name), name))
    pattern = "|".join(map(re.escape, names)) or r"(?!)"
    return re.compile(pattern), {name: number for number, name in enumerate(names)}


def _around(tokenizer: Any) -> str:
    """What the template writes around messages, the tags of thinking left out: replies may have their own."""
    text = ""
    for roles in (("user", "assistant"), ("user", "assistant", "user"), ("system", "user")):
        with contextlib.suppress(Exception):  # a template without such a place, or none at all
            said = [message(role, "a") for role in roles]
            text += tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return re.sub("</?think>", "", text)


def _state(tokenizer: Any) -> tuple[int, str]:
    """What special tokens depend on, besides the tokenizer that it is."""
    return len(tokenizer), str(tokenizer.chat_template)


@functools.lru_cache(maxsize=2)
def _twin(tokenizer: Any, state: Any) -> Any:
    """The tokenizer as a `tokenizers.Tokenizer` whose special tokens have other names, by which alone
    they are found: in the vocabulary too, where WordLevel and Unigram would look them up."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{type(tokenizer).__name__}: a text spells a special token, and only a fast tokenizer can "
            "read it as text; take one, or remove it from the data"
        )
    _, numbers = _specials(tokenizer, state)
    rules = json.loads(backend.to_str())
    rules |= {"post_processor": None, "truncation": None, "padding": None}
    for token in rules["added_tokens"]:
        if token["content"] in numbers:
            token["content"] = _other_name(token["content"])
    model = rules["model"]

    def renamed(piece: str) -> str:
        return _other_name(piece) if piece in numbers else piece

    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed(piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[renamed(piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = renamed(model["unk_token"])
    if "merges" in model:
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [p for p in pairs if not {p[0], p[1], p[0] + p[1]} & numbers.keys()]
    return Tokenizer.from_str(json.dumps(rules))
