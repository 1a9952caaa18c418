"""Answers against references by the field's own programs, ROUGE, BLEU and chrF, and how varied answers are.

Chinese and Japanese are never taken for one long word: BLEU splits them by sacrebleu's `zh` (Japanese, where
kana prevail: `char`), ROUGE into characters. The rest of a text is what these programs make of English.
"""

import re
import unicodedata
from collections.abc import Sequence

from sacrebleu import corpus_bleu, sentence_bleu

from pipeline.evaluation import metrics
from pipeline.evaluation.chrf import corpus as corpus_chrf

KINDS = ("rouge1", "rouge2", "rougeL")
SOME = 100
"""Answers of which self-BLEU is taken: each is compared with all others."""

_HAN, _KANA = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"), re.compile("[぀-ヿ]")
_WORD = re.compile(f"(?=\\w)[{metrics.CJK}]|[^\\W_{metrics.CJK}]+")


class _Words:
    """rouge-score's own tokenizer drops all but a-z and 0-9; on English this one does the same."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """F-measure of ROUGE-1, -2 and -L of each answer, 0 to 1, not stemmed; ImportError without rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer  # an extra

    scorer = RougeScorer(list(KINDS), tokenizer=_Words())
    found = [scorer.score(*pair) for pair in zip(references, texts, strict=True)]
    return {kind: [scores[kind].fmeasure for scores in found] for kind in KINDS}


def bleu_tokenizer(references: Sequence[str]) -> str:
    """Name of the sacrebleu tokenizer for texts like these."""
    kana = sum(bool(_KANA.search(text)) for text in references)
    han = sum(bool(_HAN.search(text)) for text in references)
    return "char" if kana * 2 > max(han, kana) else "zh" if han else "13a"


def corpus(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU and chrF of all answers together, 0 to 100, each against its reference."""
    tokenizer = bleu_tokenizer(references)
    bleu = corpus_bleu(texts, [references], tokenize=tokenizer, force=True).score
    return {"bleu": bleu, "chrf": corpus_chrf(texts, references)}


def variety(texts: Sequence[str]) -> dict[str, float]:
    """distinct-1 and -2 (arXiv 1510.03055): of the words and pairs of words in all answers the share of different
    ones; self-BLEU (arXiv 1802.01886): mean BLEU of an answer with the others as references, 0 to 100.

    What is not there to be counted is left out.
    """
    words = [metrics.tokens(text) for text in texts]
    found: dict[str, float] = {}
    for n in (1, 2):
        grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
        found |= {f"distinct_{n}": len(set(grams)) / len(grams)} if grams else {}
    some, tokenizer = list(texts[:SOME]), bleu_tokenizer(texts)
    scores = [
        sentence_bleu(text, some[:i] + some[i + 1 :], tokenize=tokenizer).score
        for i, text in enumerate(some)
        if len(some) > 1
    ]
    return found | ({"self_bleu": sum(scores) / len(scores)} if scores else {})
