"""Models of any kind, each with its own tokenizer, asked the same questions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from pipeline.config.evaluation import EvalConfig
from pipeline.data.template import encode_responses
from pipeline.errors import UserError
from pipeline.evaluation import classification, metrics, overlap, tallies
from pipeline.evaluation.evaluate import sampled
from pipeline.evaluation.likelihoods import label_likelihoods, room, sequence_logprobs
from pipeline.evaluation.questions import Question
from pipeline.evaluation.tallies import Answers
from pipeline.handoff import artifacts
from pipeline.models import device
from pipeline.models.loading import load_policy, load_tokenizer, prepare_cpu, quiet
from pipeline.models.tokens import pad_id
from pipeline.ppo.measures import repeated_ngrams
from pipeline.process import hub
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


def load_adapted(path: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """A policy and its tokenizer; an adapter of peft is folded into the base that it names."""
    base = None if Path(path, "config.json").is_file() else _base_of_adapter(path)
    if base is None:
        tokenizer = load_tokenizer(path)
        return load_policy(path, tokenizer), tokenizer
    from peft import PeftModel

    own = any(Path(path).glob("tokenizer*"))
    tokenizer = load_tokenizer(path if own else base)
    model = load_policy(base, tokenizer)
    try:
        return PeftModel.from_pretrained(model, path).merge_and_unload(), tokenizer
    except (OSError, ValueError, RuntimeError) as error:
        told = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: an adapter that does not fit its base {base}: {told}") from error


def _base_of_adapter(path: str) -> str | None:
    hub.look(path)
    try:
        file = find_adapter_config_file(path)
    except (OSError, ValueError):  # no model at all, which its loading tells
        return None
    return file and json.loads(Path(file).read_bytes())["base_model_name_or_path"]


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
