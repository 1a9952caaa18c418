"""Answers that are one of a few labels: which one an answer means, and how often it is the right one; pure."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.evaluation import metrics

NONE = ""
"""In a confusion matrix: an answer that means no label, or more than one."""


def as_written(text: str) -> str:
    """Letters as they are, but for their width."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _plain(text: str) -> str:
    return as_written(text).casefold()


def match(answer: str, labels: Sequence[str], plain: Callable[[str], str] = _plain) -> str | None:
    """The label that an answer means; width and what stands around it do not matter, nor case where it does not tell
    labels apart.

    That with which it begins, else the only one that it holds as whole words ("not good" is no "good"
    where both are labels); None when it holds none or several.
    """
    texts = sorted(dict.fromkeys(map(plain, labels)), key=len, reverse=True)
    found = list(re.finditer("|".join(map(_whole, texts)), plain(answer)))
    if not found:
        return None
    several = len({hit[0] for hit in found}) > 1
    if several and re.search(r"\w", plain(answer)[: found[0].start()]):
        return None
    meant = list(dict.fromkeys(label for label in labels if plain(label) == found[0][0]))
    alike = len(meant) > 1 and plain is not as_written
    return match(answer, meant, as_written) if alike else meant[0]


def _whole(label: str) -> str:
    """A pattern of a label that is not a part of a longer word; there are no such in Chinese."""
    letter = f"[^\\W{metrics.CJK}]"
    before = f"(?<!{letter})" if re.match(letter, label) else ""
    after = f"(?!{letter})" if re.match(letter, label[-1:]) else ""
    return f"{before}{re.escape(label)}{after}"


def report(
    predicted: Sequence[str | None], wanted: Sequence[str], labels: Sequence[str]
) -> dict[str, Any]:
    """Accuracy with an interval; precision, recall, F1 and support of each label, and their means over labels.

    An answer without a label is wrong, and its label is not recalled. Of nothing a share is 0, as
    scikit-learn has it by default. `confusion`: wanted label -> predicted one (or `NONE`) -> answers.
    """
    pairs = Counter(zip(wanted, predicted, strict=True))
    right = sum(pairs[label, label] for label in labels)
    low, high = metrics.wilson(right, len(wanted))
    of_labels = {}
    for label in labels:
        said, asked = list(predicted).count(label), list(wanted).count(label)
        hits = pairs[label, label]
        of_labels[label] = {
            "precision": hits / said if said else 0.0,
            "recall": hits / asked if asked else 0.0,
            "f1": 2 * hits / (said + asked) if said + asked else 0.0,
            "support": asked,
        }
    means = {
        f"macro_{key}": sum(found[key] for found in of_labels.values()) / len(of_labels)
        for key in ("precision", "recall", "f1")
    }
    return {
        "accuracy": right / len(wanted),
        "accuracy_low": low,
        "accuracy_high": high,
        **means,
        "unmatched": list(predicted).count(None) / len(wanted),
        "labels": of_labels,
        "confusion": {
            label: {p or NONE: pairs[label, p] for p in (*labels, None) if pairs[label, p]}
            for label in labels
        },
    }
