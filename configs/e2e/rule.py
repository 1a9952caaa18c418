"""A rule: the share of the attributes that a text says, less what it adds or contradicts; .25 less without an end.

Nothing is trained on it. It reads words: a slot is *said* when the text gives its value, *wrong* when it gives another
one or one that the list does not have. A proper name or a number from nowhere is wrong too. It cannot tell whether the
text is good English.
"""

import re
import unicodedata
from dataclasses import dataclass

NO_END = 0.25

FOODS = {
    "french": r"french",
    "english": r"english|british",
    "fast food": r"fast ?food",
    "italian": r"italian",
    "indian": r"indian",
    "japanese": r"japanese|sushi",
    "chinese": r"chinese",
}
PLACES = {"pub": r"pubs?|bar", "restaurant": r"restaurants?", "coffee shop": r"coffee ?shops?|cafe"}
AREAS = {
    "riverside": r"river ?side|(?:by|near|on|along|beside|next to|close to) the (?:banks? of the )?river",
    "city centre": r"(?:city|town) (?:centre|center)|(?:centre|center) of (?:the )?(?:city|town)|central(?:ly)?|downtown",
}
# A word of a level says nothing alone: `high` may be the price or the rating.
PRICES = {
    "low": r"cheap(?:ly|er)?|inexpensive|low cost|affordable|low(?:er)? pric\w+|pric\w+ LINK low|"
    r"(?:less than|under|below|up to|lower than) ?(?:£ ?)?20\b",
    "middle": r"moderate(?:ly)? (?:pric\w+|cost)|pric\w+ LINK (?:moderate|average|mid)\w*|mid pric\w+|"
    r"(?:average|medium|mid range|reasonable|reasonably|fair|fairly) pric\w+|(?:£ ?)?20 ?(?:to|and|or)? ?(?:£ ?)?25\b",
    "high": r"expensive|pricey|high(?:er|ly)? (?:end )?pric\w+|pric\w+ LINK high|"
    r"(?:more than|over|above|higher than) ?(?:£ ?)?30\b",
}
RATED = r"(?:customers? |consumer |user |overall )*(?:rat(?:ing|ings|ed|es?)|reviews?|reviewed|satisfaction|feedback)"
RATINGS = {
    "low": rf"(?:low|poor|bad)(?:ly|er)? {RATED}|{RATED} LINK (?:low|poor|bad)\w*|SCORE(1|one)",
    "middle": rf"(?:average|moderate|medium|mediocre|decent|ok)(?:ly)? {RATED}|{RATED} LINK (?:average|moderate|mediocre)\w*|SCORE(3|three)",
    "high": rf"(?:high|good|great|excellent|well|top|best)(?:ly|est)? {RATED}|{RATED} LINK (?:high|excellent|good|great)\w*|SCORE(5|five)",
}
LEVELS = {
    **dict.fromkeys(["cheap", "low", "less than £20", "1 out of 5"], "low"),
    **dict.fromkeys(["moderate", "average", "£20 25", "3 out of 5"], "middle"),
    **dict.fromkeys(["high", "more than £30", "5 out of 5"], "high"),
}
SCORE = r"\bDIGIT ?(?:out ?(?:of )?|of |/) ?(?:5|five)\b|\bDIGIT stars?\b"
LINK = r"(?:(?:range|ranges|level|is|are|of|as|from|it|its|a|an|the|in|at|very|being|quite|around|was|were|s|customers?|rat\w+|pric\w+) ){0,4}"
FRIENDLY = (
    r"(?:famil(?:y|ies)|kids?|child(?:ren)?|childs)(?: and (?:kids?|famil\w+|child\w*))? ?(?:friendly|oriented)|"
    r"friendly (?:for|to|towards) (?:\w+ )?(?:famil\w+|kids|child\w*)|"
    r"(?:for|welcom\w+|allow\w*|accommodat\w+|accept\w*|cater\w*(?: to| for)?|bring) "
    r"(?:(?:the|your|you|all|whole|entire|a|any|with|its) ){0,3}(?:famil\w+|kids|child\w*)|"
    r"(?:famil\w+|kids|child\w*) (?:are |is )?(?:also )?(?:very )?(?:welcome|allowed|welcomed|accepted|permitted)|"
    r"family (?:style )?(?:restaurant|pub|coffee shop|place|venue|establishment|atmosphere|environment)"
)
NEGATIVE = (
    r"(?:\b(?:not|no|non|isnt|never|doesnt|dont|arent|unsuitable|nor|without)\b(?: \w+){0,4}? ?)"
    rf"(?:{FRIENDLY}|kids\b|child\w*|famil\w+)|(?:famil\w+|kids|child\w*)(?: \w+){{0,2}} (?:not|never|arent|isnt)\b|"
    r"(?:family|kids?|child(?:ren)?) unfriendly|(?:only|for) adults|adults? (?:only|friendly|oriented|pub|restaurant|coffee shop|atmosphere)"
)
CAPITALS = set(
    "i it its the this there they a an in on at with near by for you if located situated families customers french "
    "english british italian indian japanese chinese fast food pub restaurant coffee shop riverside city centre center "
    "price range customer rating cafe and is of family friendly not kid kids child children high low average moderate "
    "cheap moderately highly".split()
)


@dataclass(frozen=True)
class Verdict:
    """What a text says of its attribute list; names of slots."""

    slots: int
    said: frozenset[str]
    wrong: tuple[str, ...]
    """Slots with another value or from nowhere; `name:X` and `number:N` for others."""

    @property
    def complete(self) -> bool:
        """Every attribute is said."""
        return len(self.said) == self.slots

    @property
    def faithful(self) -> bool:
        """Every attribute is said and nothing is wrong."""
        return self.complete and not self.wrong


def score(prompts, responses, rows, ended=None) -> list[float]:
    """(said - wrong) / attributes of each response, and NO_END less where it was cut off."""
    ended = [True] * len(responses) if ended is None else ended
    verdicts = map(read, prompts, responses)
    return [
        (len(v.said) - len(v.wrong)) / v.slots - (0.0 if end else NO_END)
        for v, end in zip(verdicts, ended, strict=True)
    ]


def exact(prompts, responses, rows) -> list[bool]:
    """Whether a response says every attribute and nothing wrong."""
    return [read(*pair).faithful for pair in zip(prompts, responses, strict=True)]


def attributes(prompt: str) -> dict[str, str]:
    """`name[The Mill], area[riverside]` -> slot: value. ValueError when there is none."""
    found = {slot.strip(): value for slot, value in re.findall(r"([\w ]+)\[(.*?)\]", prompt)}
    if not found:
        raise ValueError(f"no attributes in {prompt!r}")
    return found


def read(prompt: str, text: str) -> Verdict:
    """What a text says of the attribute list in its prompt."""
    asked = {slot: _plain(value) for slot, value in attributes(prompt).items()}
    said, wrong = set(), []
    plain = _plain(text)
    for slot in ("near", "name"):  # their words (Indian, Café) say nothing of the other slots
        if (value := asked.get(slot)) and re.search(rf"\b{re.escape(value)}\b", plain):
            said.add(slot)
            plain = re.sub(rf"\b{re.escape(value)}\b", "#", plain)
    for slot, found in _values(plain).items():
        right = {LEVELS.get(asked.get(slot, ""), asked.get(slot, ""))}
        said |= {slot} if slot in asked and found & right else set()
        if slot == "eatType":  # "a pub restaurant", "the restaurant is a pub": a general word
            found -= {"restaurant"} if slot not in asked or found & right else set()
        wrong += [slot] * len(found - right)
    return Verdict(len(asked), frozenset(said), (*wrong, *_from_nowhere(text, asked)))


def _values(plain: str) -> dict[str, set[str]]:
    """Slot -> the values that a text gives it, whatever was asked."""

    def there(patterns: dict[str, str]) -> set[str]:
        return {value for value, pattern in patterns.items() if re.search(_ready(pattern), plain)}

    for dear, cheap in (("expensive|pricey", "inexpensive"), ("cheap|inexpensive", "expensive")):
        plain = re.sub(
            rf"\b(?:not|isnt|arent|never) (?:very |too |that )?(?:{dear})\b", cheap, plain
        )
    no = bool(re.search(_ready(NEGATIVE), plain))
    rest = re.sub(_ready(NEGATIVE), "#", plain)
    yes = bool(re.search(_ready(FRIENDLY), rest))
    return {
        "eatType": there(PLACES),
        "food": there(FOODS),
        "priceRange": there(PRICES),
        "customer rating": there(RATINGS),
        "area": there(AREAS),
        "familyFriendly": {value for value, is_there in (("no", no), ("yes", yes)) if is_there},
    }


def _ready(pattern: str) -> str:
    """A pattern with its abbreviations written out, at the start of a word."""
    pattern = re.sub(
        r"SCORE(\(.*?\))", lambda m: SCORE.replace("DIGIT", m[1].replace("(", "(?:")), pattern
    )
    return rf"(?<!\w)(?:{pattern.replace('LINK ', LINK)})(?!\w)"


def _from_nowhere(text: str, asked: dict[str, str]) -> list[str]:
    """Capitalised words within a sentence and numbers that no attribute has."""
    known = CAPITALS | set(" ".join(asked.values()).split())
    inside = re.findall(r"(?<=[\w,;] )[A-Z][\w'’]+", text)
    names = {word for word in map(_plain, inside) if word and not set(word.split()) <= known}
    numbers = set(re.findall(r"\d+", text)) - set(
        "1 3 5 20 25 30".split()
    )  # those are in the slots
    return [*(f"name:{word}" for word in sorted(names)), *(f"number:{n}" for n in sorted(numbers))]


def _plain(text: str) -> str:
    """Lower case without accents and signs other than £ and /; | between the parts of a sentence."""
    bare = unicodedata.normalize("NFKD", text.casefold().replace("’", "'"))
    bare = "".join(c for c in bare if not unicodedata.combining(c)).replace("'", "")
    bare = re.sub(r"[,.;:!?]", " | ", bare)
    return " ".join(re.sub(r"[^\w£/|]+", " ", bare).split())
