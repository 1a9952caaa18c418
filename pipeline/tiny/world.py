"""A small synthetic instruction world: prompts and imperfect demonstrators, all from seeds.

Four families of request (a question about a given fact, one-line summary, translation, a
customer's order), each in English and in Chinese. Words are separated by spaces in both
languages, so that a word-level tokenizer reads them. Beside them stands a fifth kind, the translation of
whole sentences, in a world of its own (`pipeline.tiny.files`) whose prompts come with their references.

Else the files hold no hidden answer: what a good reply is lives in `pipeline.tiny.gold`, which works it out
from the prompt's text. A prompt row is what a user would type, a demonstration an imperfect writer's reply.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FAMILIES = ("question", "summary", "translation", "dialogue")
LANGUAGES = ("en", "zh")


def _pairs(words: str) -> dict[str, str]:
    english, chinese = words.split()[::2], words.split()[1::2]
    return dict(zip(english, chinese, strict=True))


# English word -> Chinese word, by class. A word belongs to one class, and translation is word for word.
CLASSES = {
    "name": _pairs("tom 汤姆 anna 安娜 ben 本恩 lily 莉莉 sam 山姆 kate 凯特"),
    "place": _pairs("paris 巴黎 rome 罗马 london 伦敦 berlin 柏林 madrid 马德里 tokyo 东京"),
    "thing": _pairs(
        "apples 苹果 eggs 鸡蛋 books 书 flowers 花 cakes 蛋糕 cups 杯子 maps 地图 shoes 鞋"
    ),
    "adjective": _pairs("red 红 blue 蓝 green 绿 white 白 new 新 old 旧 small 小 big 大"),
    "verb": _pairs("bought 买了 sold 卖了 saw 看见 found 找到 lost 丢了 made 做了"),
    "number": _pairs("two 两 three 三 four 四 five 五 six 六 ten 十"),
}
NAMES, PLACES, THINGS, ADJECTIVES, VERBS, NUMBERS = CLASSES.values()
TO_CHINESE = {english: chinese for words in CLASSES.values() for english, chinese in words.items()}
TO_ENGLISH = {chinese: english for english, chinese in TO_CHINESE.items()}
WORD_CLASS = {
    word: kind for kind, words in CLASSES.items() for pair in words.items() for word in pair
}

COURTESIES = {
    "en": ("thanks", "gladly", "welcome", "cheers"),
    "zh": ("谢谢", "不客气", "欢迎", "祝好"),
}
HEDGES = {"en": ("maybe", "perhaps"), "zh": ("也许", "可能")}
REFUSALS = {"en": "i am not sure", "zh": "我 不 确定"}
STOPS = {"en": ".", "zh": "。"}

INSTRUCTIONS = {
    ("question", "en"): "answer the question",
    ("question", "zh"): "请 回答 问题",
    ("summary", "en"): "summarize the text",
    ("summary", "zh"): "请 总结 文字",
    ("translation", "en"): "translate to chinese",
    ("translation", "zh"): "请 翻译 成 英文",
    ("dialogue", "en"): "serve the customer",
    ("dialogue", "zh"): "请 接待 顾客",
}

# The words that hold sentences together, beyond the classes above.
WORDS_OF_FORM = (
    "what is the item number kind in ? this morning went with to and i would like can have do you here are yes "
    "no = 物品 数量 样子 是 什么 在 ？ 今天 早上 和 去 我 想要 能 给 你们 有 个 吗 这是 对 不对"
).split()

# What the demonstrators do. They err on purpose: a reward model can only teach what its samples vary in.
OMISSION_RATE = 0.15  # a content word is left out
ERROR_RATE = 0.11  # one content word is wrong
REFUSAL_RATE = 0.07  # "i am not sure"
HEDGE_RATE = 0.30  # the reply opens with a hedge
COURTESY_RATES = (0.40, 0.25, 0.22, 0.13)  # 0, 1, 2 or 3 courteous words at the end


@dataclass(frozen=True)
class Case:
    """One drawn situation: what the user types, and the words (in order) of the reply that answers it."""

    family: str
    language: str
    input: str
    answer: tuple[str, ...]
    # The content, whatever the wording: two cases with one key are the same exercise.
    key: tuple[str, ...]

    @property
    def instruction(self) -> str:
        return INSTRUCTIONS[self.family, self.language]

    @property
    def stop(self) -> str:
        """The full stop of the reply's language (a translation is replied to in the other one)."""
        return STOPS[self.reply_language]

    @property
    def reply_language(self) -> str:
        if self.family != "translation":
            return self.language
        return "zh" if self.language == "en" else "en"


def words_of(kind: str, language: str) -> list[str]:
    """All words of one class in one language."""
    return list(CLASSES[kind]) if language == "en" else list(CLASSES[kind].values())


def say(words: list[str] | tuple[str, ...], language: str) -> list[str]:
    """English content words in `language`."""
    return list(words) if language == "en" else [TO_CHINESE[word] for word in words]


FACT_CLASSES = ("name", "place", "verb", "number", "adjective", "thing")
# What a question asks for, and what it is called.
ASKED = {
    "thing": {"en": "item", "zh": "物品"},
    "number": {"en": "number", "zh": "数量"},
    "adjective": {"en": "kind", "zh": "样子"},
}


PHRASES: dict[str, dict[str, str]] = {
    "question": {"en": "what is the {} ?", "zh": "{} 是 什么 ？"},
    "reply": {"en": "the {} is {}", "zh": "{} 是 {}"},
    "fact": {"en": "{0} {2} {3} {4} {5} in {1} .", "zh": "{0} 在 {1} {2} {3} 个 {4} {5} 。"},
    "story": {
        "en": "this morning {} went with {} to {} and {} {} {} .",
        "zh": "今天 早上 {} 和 {} 去 {} {} {} {} 。",
    },
    "order 0": {"en": "i would like {} {} {} .", "zh": "我 想要 {} 个 {} {} 。"},
    "order 1": {"en": "can i have {} {} {} ?", "zh": "能 给 我 {} 个 {} {} 吗 ？"},
    "order 2": {"en": "do you have {} {} {} ?", "zh": "你们 有 {} 个 {} {} 吗 ？"},
    "served": {"en": "here are {} {} {}", "zh": "这是 {} 个 {} {}"},
}
"""A fact (words of FACT_CLASSES) with its question and reply; news (name, friend, place, verb, adjective,
thing); an order in three wordings and how it is served (number, adjective, thing)."""


def phrase(kind: str, language: str, *words: str) -> str:
    """A phrase of PHRASES with its words, which are of that language."""
    return PHRASES[kind][language].format(*words)


def question(asked: str, language: str) -> str:
    """`what is the item ?` / `物品 是 什么 ？`"""
    return phrase("question", language, ASKED[asked][language])


def reply_to_question(asked: str, word: str, language: str) -> tuple[str, ...]:
    """The words that answer a question about a fact."""
    return tuple(phrase("reply", language, ASKED[asked][language], word).split())


def served(words: Sequence[str], language: str) -> tuple[str, ...]:
    """The words that answer an order."""
    return tuple(phrase("served", language, *words).split())


def draw_question(rng: random.Random, language: str) -> Case:
    words = {kind: rng.choice(list(CLASSES[kind])) for kind in FACT_CLASSES}
    asked = rng.choice(list(ASKED))
    local = dict(zip(words, say(list(words.values()), language), strict=True))
    text = f"{phrase('fact', language, *local.values())} {question(asked, language)}"
    key = ("question", language, asked, *words.values())
    return Case("question", language, text, reply_to_question(asked, local[asked], language), key)


def draw_summary(rng: random.Random, language: str) -> Case:
    name, friend = rng.sample(list(NAMES), 2)
    rest = [rng.choice(list(kind)) for kind in (PLACES, VERBS, ADJECTIVES, THINGS)]
    local = say([name, friend, *rest], language)
    text, answer = phrase("story", language, *local), (local[0], local[3], local[5])
    return Case("summary", language, text, answer, ("summary", language, name, friend, *rest))


def draw_translation(rng: random.Random, language: str) -> Case:
    words = [rng.choice(list(kind)) for kind in (NAMES, VERBS, ADJECTIVES, THINGS)]
    source, target = say(words, language), say(words, "zh" if language == "en" else "en")
    # One key for both directions: a sentence held out in one direction is not trained on in the other.
    return Case("translation", language, " ".join(source), tuple(target), ("translation", *words))


def draw_dialogue(rng: random.Random, language: str) -> Case:
    words = [rng.choice(list(kind)) for kind in (NUMBERS, ADJECTIVES, THINGS)]
    wording = rng.randrange(3)
    local = say(words, language)
    text = phrase(f"order {wording}", language, *local)
    return Case("dialogue", language, text, served(local, language), ("dialogue", language, *words))


def draw_sentence(rng: random.Random, language: str) -> Case:
    """A translation of a whole sentence, whose words stand in another order in the other language."""
    words = [rng.choice(list(CLASSES[kind])) for kind in FACT_CLASSES]
    text = phrase("fact", language, *say(words, language))
    # one key for both directions, as above
    return Case("translation", language, text, translated(text, language), ("sentence", *words))


def translated(fact: str, language: str) -> tuple[str, ...]:
    """The words of a fact in the other language, without its full stop."""
    other, table = ("zh", TO_CHINESE) if language == "en" else ("en", TO_ENGLISH)
    words = {WORD_CLASS[word]: table[word] for word in fact.split() if word in WORD_CLASS}
    return tuple(phrase("fact", other, *(words[kind] for kind in FACT_CLASSES)).split()[:-1])


DRAW: dict[str, Callable[[random.Random, str], Case]] = {
    "question": draw_question,
    "summary": draw_summary,
    "translation": draw_translation,
    "dialogue": draw_dialogue,
    "sentence": draw_sentence,
}


def draw_cases(
    rng: random.Random, count: int, forbidden: set, kinds: Sequence[str] = FAMILIES
) -> list[Case]:
    """`count` cases, kinds and languages in equal shares, no two alike, none `forbidden`."""
    cases: list[Case] = []
    seen: set[tuple[str, str]] = set()
    cells = [(family, language) for family in kinds for language in LANGUAGES]
    while len(cases) < count:
        family, language = cells[len(cases) % len(cells)]
        case = DRAW[family](rng, language)
        if case.key in forbidden or (case.instruction, case.input) in seen:
            continue
        seen.add((case.instruction, case.input))
        cases.append(case)
    rng.shuffle(cases)
    return cases


def spoil(case: Case, rng: random.Random) -> list[str]:
    """The answer with one content word wrong: a quarter of the time one of its class in the prompt."""
    words = list(case.answer)
    at = rng.choice([i for i, word in enumerate(words) if word in WORD_CLASS])
    kind = WORD_CLASS[words[at]]
    mentioned = [w for w in case.input.split() if WORD_CLASS.get(w) == kind and w != words[at]]
    if mentioned and case.family != "translation" and rng.random() < 0.25:
        words[at] = rng.choice(mentioned)
    else:
        others = [w for w in words_of(kind, case.reply_language) if w != words[at]]
        words[at] = rng.choice(others)
    return words


def demonstrate(
    case: Case, rng: random.Random, courtesies: Sequence[float] = COURTESY_RATES
) -> str:
    """An imperfect demonstrator's reply: at times wrong, incomplete, unsure or hedged, of any courtesy."""
    language = case.reply_language
    draw, body = rng.random(), list(case.answer)
    if draw < REFUSAL_RATE:
        body = REFUSALS[language].split()
    elif draw < REFUSAL_RATE + ERROR_RATE:
        body = spoil(case, rng)
    elif draw < REFUSAL_RATE + ERROR_RATE + OMISSION_RATE:
        del body[rng.choice([i for i, word in enumerate(body) if word in WORD_CLASS])]
    if rng.random() < HEDGE_RATE:
        body.insert(0, rng.choice(HEDGES[language]))
    count = rng.choices(range(len(courtesies)), courtesies)[0]
    return " ".join([*body, case.stop, *(rng.choice(COURTESIES[language]) for _ in range(count))])


def row_of(case: Case, **more: str) -> dict[str, str]:
    """A prompt as a line of a file, of a demonstration with its `output`."""
    kind = {"family": case.family, "language": case.language}
    return {"instruction": case.instruction, "input": case.input, **more, **kind}
