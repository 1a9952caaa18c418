"""Keys of eval.yaml, documented where they are declared; read by `pipeline.config.load.load_config`."""

import operator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.schema import Data, Positive
from pipeline.config.section import CodeName, DataName, ModelName, Section, Text

Split = Literal["test", "validation"]


class JudgeConfig(Section):
    """A judge of pairs of answers: exactly one of `module`, `reward`, `llm`, `url` and `votes`."""

    name: Text | None = None
    """In tables; none = what it is."""
    module: CodeName | None = None
    """Like the key `judge`: the higher score wins."""
    reward: ModelName | None = None
    """A reward model's folder or hub id, with its own tokenizer: the higher score wins."""
    llm: ModelName | None = None
    """A language model's folder or hub id, asked which of two answers is better: the likelier of "A" and "B". Asked
    in both orders; it has to say the same, else they tie."""
    url: Text | None = None
    """An OpenAI-compatible server (`https://host/v1`), asked the same in both orders; it may also say "tie". Its
    answers are kept by their content in `checkpoints/eval/answers` and not asked for again."""
    model: Text | None = None
    """The server's name of the model."""
    key: Text | None = "OPENAI_API_KEY"
    """Environment variable that holds the server's key; none = it wants none."""
    calls: Positive = 1000
    """Most requests of one evaluation, repeated ones included."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds for one of them."""
    votes: DataName | None = None
    """Rankings by people, as the labelling page writes them: those of the very answers that are compared."""

    @model_validator(mode="after")
    def _one_kind(self):
        kinds = ("module", "reward", "llm", "url", "votes")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"a judge has exactly one of {', '.join(kinds)}")
        if (self.url is None) != (self.model is None):
            raise ValueError("url and model go together")
        unread = {"key", "calls", "timeout"} & self.model_fields_set
        if unread and self.url is None:
            raise ValueError(f"{', '.join(sorted(unread))}: of a url alone")
        return self

    def title(self) -> str:
        """Its name in tables."""
        return self.name or self.model or self.module or self.reward or self.llm or "people"


def _is_text(task: str) -> bool:
    return task == "text"


class EvalConfig(Section):
    """What `python -m pipeline.evaluation` measures, and how."""

    prompts: Data
    """Held-out prompts of the split `test`: report on them, choose nothing on them."""
    validation_prompts: Data | None = None
    """Held-out prompts of the split `validation`, to choose settings on."""
    demonstrations: Data | None = None
    """Held-out demonstrations; perplexity of their responses under each model."""
    demonstrations_limit: Positive = 500
    """Demonstrations read for that."""
    pretraining: Data | None = None
    """Held-out pretraining text (key `text`, as PPO-ptx's); its perplexity under each model shows what
    fine-tuning unlearns (arXiv 2203.02155)."""
    pretraining_limit: Positive = 500
    """Texts read for that."""
    pretraining_max_length: Positive = 256
    """Their first so many tokens."""
    judge: CodeName | None = None
    """Module with `score(prompts, responses, rows, ended=None)` and maybe `exact(prompts, responses,
    rows)`; none = measure only what needs no judge."""
    judges: Annotated[list[JudgeConfig], Field(exclude_if=operator.not_)] = []
    """More judges, of pairs of answers: the run's last policy against the one before it (make eval MODEL=: each model
    against the first, a single one against the references). Win rates with intervals, at equal length, and how far
    all judges agree."""
    reference: Text | None = None
    """Key of the prompts' rows that holds a right answer, for chrF (of all answers together, by sacrebleu),
    exact match and token F1: of words, of single characters in Chinese and Japanese. Case and punctuation
    count; full and half width are one (chrF takes them as they are)."""
    task: Annotated[Literal["text", "classification", "likelihood"], Field(exclude_if=_is_text)] = (
        "text"
    )
    """What references are (make eval MODEL= DATA=). text: an answer is measured by its words. classification: they
    are labels; an answer means the one with which it begins, else the only one that it holds as whole words, case
    aside where labels do not differ by it alone. likelihood: labels, of which that is taken which the model gives
    the most nats per token, its end included."""
    labels: Annotated[list[Text], Field(exclude_if=operator.not_)] = []
    """Those labels; none = all that occur."""
    group_by: Text | list[Text] = []
    """Keys of the prompts' rows to break results down by, e.g. `[family, language]`."""

    n: Positive = 400
    """Use the first so many prompts."""
    seed: int = 1
    """Of the sampling; the same for every model."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Divides the logits in sampling; 0 = always the likeliest token, and no KL, which is of what is sampled."""
    max_new_tokens: Positive = 64
    """Longest response, in tokens."""
    stop_tokens: list[Text] = []
    """What ends a response besides EOS: tokens, or strings of several that are looked for in its text."""
    batch_size: Positive = 256
    """Responses sampled at once."""
    threads: Positive | None = None
    """CPU threads; none = as many as torch picks."""

    candidates: Positive = 8
    """SFT responses per prompt for best-of-n and for the reward model against the judge; 1 = neither."""
    candidate_prompts: Positive = 100
    """Prompts that get so many responses."""
    samples: Positive = 40
    """Prompts whose responses the report shows."""

    @model_validator(mode="after")
    def _known_keys_once(self):
        if len(set(self.groups())) != len(self.groups()):
            raise ValueError("group_by names a key twice")
        if self.labels and self.task == "text":
            raise ValueError("labels: of task classification or likelihood")
        titles = ["judge", "reward model", *(judge.title() for judge in self.judges)]
        if twice := [name for name in titles if titles.count(name) > 1]:
            raise ValueError(f"judges: two are called {twice[0]!r}; give each a name of its own")
        return self

    def groups(self) -> list[str]:
        """`group_by` as a list."""
        return [self.group_by] if isinstance(self.group_by, str) else list(self.group_by)

    def of_split(self, split: Split) -> "EvalConfig":
        """What decides the result on a split: the prompts of the other one do not."""
        return self.model_copy(update={"prompts": self.data(split), "validation_prompts": None})

    def data(self, split: Split) -> Data | None:
        """Prompts of a split."""
        return self.prompts if split == "test" else self.validation_prompts
