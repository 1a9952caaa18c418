"""Keys of eval.yaml, documented where they are declared; read by `pipeline.config.load.load_config`."""

import operator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.schema import Data, Positive
from pipeline.config.section import CodeName, Section, Text

Split = Literal["test", "validation"]


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
    reference: Text | None = None
    """Key of the prompts' rows that holds a right answer, for chrF (of all answers together, by sacrebleu),
    exact match and token F1: of words, of single characters in Chinese and Japanese. Case and punctuation
    count; full and half width are one (chrF takes them as they are)."""
    task: Annotated[Literal["text", "classification", "likelihood"], Field(exclude_if=_is_text)] = (
        "text"
    )
    """What references are (make eval MODEL= DATA=). text: an answer is measured by its words. classification: they
    are labels; an answer means the one with which it begins, else the only one that it holds as whole words, case
    aside. likelihood: labels, of which that is taken which the model gives the most nats per token, its end
    included."""
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
