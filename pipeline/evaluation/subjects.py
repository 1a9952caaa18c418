"""Models of any kind, each with its own tokenizer, asked the same questions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.config.evaluation import EvalConfig
from pipeline.data.literals import tell_unknown
from pipeline.data.template import encode_responses
from pipeline.errors import UserError
from pipeline.evaluation import classification, metrics, overlap, tallies
from pipeline.evaluation.evaluate import sampled
from pipeline.evaluation.likelihoods import label_likelihoods, room, sequence_logprobs
from pipeline.evaluation.panel import Contest, Judging, judged
from pipeline.evaluation.questions import Question
from pipeline.evaluation.tallies import Answers
from pipeline.handoff import artifacts
from pipeline.models import device
from pipeline.models.adapted import load_adapted
from pipeline.models.loading import prepare_cpu, quiet
from pipeline.models.tokens import pad_id
from pipeline.ppo.measures import repeated_ngrams
from pipeline.process.progress import say


@dataclass
class Subject:
    """A model that is asked."""

    name: str
    path: str
    manifest_sha256: str
    """Of an artifact of ours; "" of any other model."""
    model: Any
    tokenizer: PreTrainedTokenizerBase

    def ids(self, question: Question) -> tuple[list[int], list[int]]:
        """Of a prompt and its reference, its end included."""
        prompt, [ids] = encode_responses(self.tokenizer, question.messages, [question.reference])
        return prompt, ids

    def fits(self, question: Question, new: int) -> bool:
        """Whether there are places for a prompt, and after it for an answer's tokens and its reference's."""
        prompt, reference = self.ids(question)
        return room({self.name: self.model}, len(prompt)) > max(new, len(reference) - 1)


@dataclass
class Found:
    """What a model answered to P prompts, and what it thinks of the references."""

    answers: Answers
    ids: list[list[int]]
    references: list[str]
    nll: list[float]
    """Nats of each reference, its end included."""
    sizes: list[int]
    """Tokens of each, its end included."""
    labels: list[str] = field(default_factory=list)
    predicted: list[str | None] = field(default_factory=list)

    def numbers(self, rows: Sequence[int]) -> dict[str, Any]:
        """All that is measured of some of the answers."""
        wanted = [self.references[i] for i in rows]
        nll, bytes_ = sum(self.nll[i] for i in rows), sum(len(text.encode()) for text in wanted)
        return {
            "n": len(rows),
            "perplexity": metrics.perplexity(nll, sum(self.sizes[i] for i in rows)),
            "byte_perplexity": metrics.perplexity(nll, bytes_),
            **(self._of_texts(rows, wanted) if self.answers.texts else {}),
            **(self._of_labels(rows, wanted) if self.labels else {}),
        }

    def row(self, i: int) -> dict[str, Any]:
        """The i-th answer as a line of the samples file has it."""
        label = {"label": self.predicted[i]} if self.predicted else {}
        return label | (self.answers.row(i) if self.answers.texts else {})

    def _of_texts(self, rows: Sequence[int], wanted: list[str]) -> dict[str, Any]:
        texts = [self.answers.texts[i] for i in rows]
        repeated, grams = repeated_ngrams([self.ids[i] for i in rows])
        return {
            **tallies.means(self.answers.columns(), rows),
            **overlap.corpus(texts, wanted),
            **overlap.variety(texts),
            "repetition": repeated / max(grams, 1),
        }

    def _of_labels(self, rows: Sequence[int], wanted: list[str]) -> dict[str, Any]:
        said = [self.predicted[i] for i in rows]
        return classification.report(said, [text.strip() for text in wanted], self.labels)


def loaded(config: EvalConfig, paths: dict[str, str]) -> list[Subject]:
    """The models by name; files of an artifact of ours are as its manifest says."""
    quiet()
    prepare_cpu(config.threads)
    out = []
    for name, path in paths.items():
        made = ""
        if artifacts.is_published(Path(path)):
            artifacts.read(path)
            made = artifacts.manifest_hash(Path(path))
        model, tokenizer = load_adapted(path)
        out.append(Subject(name, path, made, model.to(device.device()), tokenizer))
    return out


def that_fit(config: EvalConfig, subjects: list[Subject], asked: list[Question]) -> list[Question]:
    """Questions for which every model has places; the others are said and left out."""
    new = 0 if config.task == "likelihood" else config.max_new_tokens
    fit = [q for q in asked if all(subject.fits(q, new) for subject in subjects)]
    left = f"among the models' places beside max_new_tokens {config.max_new_tokens}"
    if not fit:
        raise UserError(f"eval: no row fits {left}")
    if len(fit) < len(asked):
        say(
            f"eval: {len(asked) - len(fit)} of {len(asked)} rows are left out, they do not fit {left}"
        )
    return fit


def answered(
    config: EvalConfig, subject: Subject, asked: list[Question], labels: list[str]
) -> Found:
    """A model's answers with their grades, and the likelihoods of references and, if they decide, of labels."""
    prompts, wanted = map(list, zip(*map(subject.ids, asked), strict=True))
    references = [q.reference for q in asked]
    tell_unknown(f"eval: {subject.name}: references", subject.tokenizer, wanted)
    logprobs = sequence_logprobs(subject.model, prompts, wanted, pad_id(subject.tokenizer))
    nll, sizes = [-value for value in logprobs], list(map(len, wanted))
    if config.task == "likelihood":
        messages = [q.messages for q in asked]
        scores = label_likelihoods(subject.model, subject.tokenizer, messages, labels)
        picks = [max(range(len(labels)), key=row.__getitem__) for row in scores]
        best: list[str | None] = [labels[i] for i in picks]
        answers = Answers([], [], [])
        return Found(answers, [], references, nll, sizes, labels, best)
    responses = sampled(config, subject.tokenizer, subject.name, subject.model, prompts)
    texts = [r.text for r in responses]
    answers = Answers(texts, [len(r.ids) for r in responses], [r.ended for r in responses])
    answers.grades = grades(texts, references)
    predicted = [classification.match(text, labels) for text in texts] if labels else []
    ids = [r.ids for r in responses]
    return Found(answers, ids, references, nll, sizes, labels, predicted)


def grades(texts: list[str], references: list[str]) -> dict[str, Sequence[float]]:
    """One number an answer, of everything that is measured so; ROUGE where its package is there."""
    found: dict[str, Sequence[float]] = dict(metrics.against(texts, references))
    try:
        return found | overlap.rouge(texts, references)
    except ImportError:
        say("eval: ROUGE is left out: it needs the rouge-score package: pip install rouge-score")
        return found


def contests(
    found: dict[str, Found],
    asked: list[Question],
    others: dict[str, Judging],
    samples: list[dict[str, Any]],
) -> dict[str, Any]:
    """What judges say of each model against the first, of a single one against the references."""
    first, *rest = found
    known = [q.reference for q in asked]
    own = found[first]
    sides = {f"{name}_vs_{first}": (found[name].answers, own.answers) for name in rest} or {
        f"{first}_vs_reference": (own.answers, Answers(known, own.sizes, [True] * len(known)))
    }
    messages, rows = [q.messages for q in asked], [q.row for q in asked]
    return {
        name: judged(Contest(messages, rows, *pair), others, samples)
        for name, pair in sides.items()
    }
