"""What is measured, as pure functions of numbers and strings; numpy and the standard library only.

Scores compare responses: a higher score is a better response. Ranks compare them the other way: 1
is the best and equal ranks are a tie. Everything is a plain float or a small named tuple of floats.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""

CJK = "\u2e80-\u2fff\u3001-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CJK_CHARACTER = re.compile(f"[{CJK}]")
_PIECE = re.compile(f"[{CJK}]|[^\\W{CJK}]+(?:[.,'’-][^\\W{CJK}]+)*|\\S")
_WIDE = re.compile("[\uff00-\uffef]+")


def tokens(text: str) -> list[str]:
    """Words between blanks; in a text with Chinese or Japanese characters, each of these, the words of
    other scripts and every sign (CMRC 2018's segmentation, whose F1 is over longest common parts).

    Letters composed or not, and signs of full or half width, are the same; case and signs count.
    """
    text = _WIDE.sub(lambda wide: unicodedata.normalize("NFKC", wide[0]), text)
    text = unicodedata.normalize("NFC", text)
    return _PIECE.findall(text) if _CJK_CHARACTER.search(text) else text.split()


def exact_match(prediction: str, reference: str) -> bool:
    """Same tokens in the same order: blanks count between words alone, and not between Chinese ones."""
    return tokens(prediction) == tokens(reference)


class Overlap(NamedTuple):
    """Shares in 0..1."""

    precision: float
    recall: float
    f1: float


def token_overlap(prediction: str, reference: str) -> Overlap:
    """Of the bags of tokens (SQuAD's, arXiv 1606.05250 section 6); two empty texts agree, one does not."""
    predicted, wanted = Counter(tokens(prediction)), Counter(tokens(reference))
    if not predicted or not wanted:
        return Overlap(*[float(predicted == wanted)] * 3)
    common, said, asked = (x.total() for x in (predicted & wanted, predicted, wanted))
    return Overlap(common / said, common / asked, 2 * common / (said + asked))


def against(texts: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """`token_precision`, `token_recall`, `token_f1` and `exact` of each answer."""
    found = list(map(token_overlap, texts, references))
    shares = {f"token_{name}": [getattr(o, name) for o in found] for name in Overlap._fields}
    return {**shares, "exact": list(map(exact_match, texts, references))}


def perplexity(nll: float, count: int) -> float:
    """exp of the mean of `count` token negative log-likelihoods that sum to `nll` nats."""
    if count <= 0:
        raise ValueError("perplexity of no tokens")
    return math.exp(min(nll / count, 700.0))


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def wilson(successes: float, n: float, z: float = Z95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927, doi 10.1080/01621459.1927.10502953).

    `successes` may be fractional: ties that count half. (0, 1) without any observation.
    """
    if n == 0:
        return Interval(0.0, 1.0)
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Interval(max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))


def clustered_wilson(points: Sequence[float], sizes: Sequence[int]) -> Interval:
    """Wilson's interval of sum(points) / sum(sizes) where each prompt's observations hang together.

    The pairs of one prompt share its responses and count for less than as many of as many prompts:
    Wilson's n is the number of independent observations with the variance that the share has between
    prompts (Kish 1965), at least the number of prompts and at most that of observations.
    """
    total, prompts = sum(sizes), sum(size > 0 for size in sizes)
    if not total:
        return Interval(0.0, 1.0)
    p = sum(points) / total
    squares = sum((x - p * m) ** 2 for x, m in zip(points, sizes, strict=True))
    variance = squares / total**2 * prompts / max(prompts - 1, 1)
    n = min(max(p * (1 - p) / variance if variance > 0 else 0, prompts), total)
    return wilson(p * n, n)


def bootstrap_mean(values: Sequence[float], seed: int = 0, rounds: int = 2000) -> Interval:
    """Percentile bootstrap of the mean: resampled `rounds` times, a function of the seed."""
    x = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(len(x), size=(rounds, len(x)))
    low, high = np.quantile(x[picks].mean(axis=1), [0.025, 0.975])
    return Interval(float(low), float(high))


class WinRate(NamedTuple):
    """How often the first beat the second; a tie is half a win."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


def win_rate(first: Sequence[float], second: Sequence[float]) -> WinRate:
    """Wins of `first` over `second`, prompt by prompt, with Wilson's interval."""
    if len(first) != len(second) or not len(first):
        raise ValueError(f"win rate of {len(first)} against {len(second)} scores")
    wins = sum(a > b for a, b in zip(first, second, strict=True))
    ties = sum(a == b for a, b in zip(first, second, strict=True))
    points = wins + ties / 2
    return WinRate(
        points / len(first), *wilson(points, len(first)), wins, ties, len(first) - wins - ties
    )


def untied_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """(better, worse) indices of every pair whose ranks differ; rank 1 is best."""
    n = len(ranks)
    return [(i, j) for i in range(n) for j in range(n) if ranks[i] < ranks[j]]


class Share(NamedTuple):
    """A share of so many pairs."""

    share: float
    pairs: int


def pair_points(
    scores: Sequence[Sequence[float]], ranks: Sequence[Sequence[float]]
) -> list[tuple[float, int]]:
    """For each prompt (points, untied pairs): a point for each pair whose better response scores
    higher, half a one for equal scores."""
    out = []
    for score, rank in zip(scores, ranks, strict=True):
        pairs = untied_pairs(rank)
        points = sum(1.0 if score[b] > score[w] else 0.5 * (score[b] == score[w]) for b, w in pairs)
        out.append((points, len(pairs)))
    return out


def pair_accuracy(scores: Sequence[Sequence[float]], ranks: Sequence[Sequence[float]]) -> Share:
    """Share of untied pairs, over all prompts, whose better response has the higher score.

    scores, ranks: one list of K for each prompt. Equal scores are half right, so that any constant
    score gets 0.5. Give lengths as scores for the baseline "the longer one wins". NaN without pairs.
    """
    rows = pair_points(scores, ranks)
    count = sum(pairs for _, pairs in rows)
    return Share(sum(points for points, _ in rows) / count if count else math.nan, count)


def pair_accuracy_by_k(
    scores: Sequence[Sequence[float]], ranks: Sequence[Sequence[float]]
) -> dict[int, Share]:
    """`pair_accuracy` for each number of responses K."""
    sizes = sorted({len(rank) for rank in ranks})
    chosen = {k: [i for i, rank in enumerate(ranks) if len(rank) == k] for k in sizes}
    return {
        k: pair_accuracy([scores[i] for i in rows], [ranks[i] for i in rows])
        for k, rows in chosen.items()
    }


class CalibrationRow(NamedTuple):
    """Pairs of like predicted probability."""

    predicted: float
    observed: float
    pairs: int


def calibration(margins: Sequence[float], bins: int = 5) -> list[CalibrationRow]:
    """Predicted against observed probability that the higher-scored response is the better one.

    margins: score of the better response minus score of the worse, one for each untied pair. The
    Bradley-Terry model says the higher-scored wins with probability sigmoid(|margin|), in [0.5, 1];
    a margin of 0 counts half. Empty bins are left out.
    """
    d = np.asarray(margins, dtype=float)
    p = 1 / (1 + np.exp(-np.abs(d)))
    won = np.where(d == 0, 0.5, (d > 0).astype(float))
    which = np.minimum(((p - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        CalibrationRow(float(p[mine].mean()), float(won[mine].mean()), int(mine.sum()))
        for mine in (which == b for b in np.unique(which))
    ]


def calibration_error(rows: Sequence[CalibrationRow]) -> float:
    """Mean distance between predicted and observed, weighted by pairs (arXiv 1706.04599 eq. 3)."""
    total = sum(row.pairs for row in rows)
    return sum(row.pairs * abs(row.predicted - row.observed) for row in rows) / total


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Linear correlation in -1..1; 0 when either does not vary."""
    a = np.asarray(x, dtype=float) - np.mean(x)
    b = np.asarray(y, dtype=float) - np.mean(y)
    spread = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / spread if spread > 0 else 0.0


def best_of_n(proxy: Sequence[float], gold: Sequence[float], n: int) -> float:
    """Unbiased estimate of the gold of the best of n responses by proxy, from N >= n of one prompt.

    Mean over all C(N, n) subsets: in ascending order of proxy the i-th (from 0) is the best of
    C(i, n-1) of them (arXiv 2112.09332, appendix I); among equal proxies any may be picked. Give
    proxy as gold for the proxy's own value.
    """
    if not 1 <= n <= len(proxy):
        raise ValueError(f"best of {n} from {len(proxy)} responses")
    by_proxy: dict[float, list[float]] = {}
    for p, g in zip(proxy, gold, strict=True):
        by_proxy.setdefault(p, []).append(g)
    ascending = [sum(by_proxy[p]) / len(by_proxy[p]) for p in sorted(proxy)]
    subsets = math.comb(len(proxy), n)
    return sum(math.comb(i, n - 1) / subsets * g for i, g in enumerate(ascending))


def kl_of_best_of_n(n: int) -> float:
    """KL in nats of best-of-n from the model sampled: log n - (n - 1)/n (arXiv 2009.01325, G.3)."""
    return math.log(n) - (n - 1) / n
