"""The reward stage's data step: sample K responses a prompt from a model, have them ranked.

Rankings travel through files: a labeler is another process that reads samples and writes ranks, so
nothing it knows can leak into training; people add theirs to `RUN/to_rank.jsonl`, which nothing here
ever overwrites or removes once it is not as it was written.
"""

import hashlib
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.schema import Data, RMConfig, Sampling
from pipeline.data.forms import Prompt, load_prompts
from pipeline.data.kept import like, pick
from pipeline.data.messages import Message, prompt_text
from pipeline.data.rankings import Ranking, load_rankings
from pipeline.data.sources import Row, read_rows
from pipeline.data.template import encode_prompt, encode_responses, tokenizer_hash
from pipeline.data.waiting import is_ranked
from pipeline.errors import UserError
from pipeline.feedback.exchange import REPLACED
from pipeline.handoff import artifacts
from pipeline.handoff.artifacts import is_published
from pipeline.handoff.lineage import inputs_of
from pipeline.handoff.remembered import command
from pipeline.models.device import device
from pipeline.models.forward import score_sequences
from pipeline.models.generation import Response, generate
from pipeline.models.loading import load_policy, load_reward, load_tokenizer
from pipeline.models.tokens import pad_id
from pipeline.process.files import jsonl, read_if_whole, sha256, write_atomically
from pipeline.process.progress import tracked

RECORD = ".to_rank.json"
"""Beside `RUN/to_rank.jsonl`: what was sampled, from what, and the hash of the file as it was written."""


def sampled_rankings(
    config: RMConfig,
    sft: Path,
    tokenizer: PreTrainedTokenizerBase,
    work: Path,
    before: Sequence[Ranking] = (),
) -> Sequence[Ranking]:
    """Rankings of a model's own responses, kept in `work`, and behind those of `before`; UserError until
    people have made them."""
    assert config.sampling is not None
    ranked = work / "rankings.jsonl"
    if not ranked.exists():
        model = sft if config.sampling.model == "sft" else Path(config.sampling.model)
        known = load_prompts(config.data, notes=[]) if before and config.data else ()
        asked = {prompt_text(one.messages) for one in known}  # those that all tied included
        by = _ranked_by_people if config.to_rank else _ranked_by_labeler
        by(config, Asking(config.sampling, config.seed, model, tokenizer, asked), ranked)
    together = like(before)
    for ranking in itertools.chain(before, load_rankings(Data(path=str(ranked)))):
        together.append(ranking)
    return together


@dataclass
class Asking:
    """What is sampled: from whom, and which prompts have their rankings already."""

    sampling: Sampling
    seed: int
    model: Path
    tokenizer: PreTrainedTokenizerBase
    asked: set[str]

    def origin(self) -> str:
        """Hash of all that decides what is sampled."""
        keys = self.sampling.model_dump(mode="json", exclude={"labeler", "model", "unsure"})
        if self.sampling.count is None:
            del keys["count"]
        files = inputs_of(self.sampling.model_copy(update={"labeler": None}))
        keys["prompts"] |= {"path": sorted(files.values())}
        named = [self.model, self.sampling.unsure]
        made = [Path(name) for name in named if name is not None and is_published(Path(name))]
        whole = [keys, self.seed, *map(artifacts.manifest_hash, made), *sorted(self.asked)]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _ranked_by_people(config: RMConfig, asking: Asking, ranked: Path) -> None:
    """Take the ranks that people have added, or write the samples and stop until they have."""
    assert config.sampling and config.to_rank
    kept, record = config.to_rank, config.to_rank.with_name(RECORD)
    origin, known = asking.origin(), read_if_whole(record)
    if kept.exists() and known.get("origin") != origin and known.get("file") == sha256(kept):
        kept.unlink()  # nobody has touched it, and this config samples something else
    if not kept.exists():
        rows = _sample(asking)
        told = {"origin": origin, "rows": [_key(row) for row in rows]}
        text = jsonl(rows)
        told["file"] = hashlib.sha256(text.encode()).hexdigest()
        write_atomically(record, json.dumps(told))
        write_atomically(kept, text)
        raise UserError(
            f"{kept}: {len(rows)} prompts of {config.sampling.prompts.path} with sampled responses, to "
            f"be ranked by people: {command(kept.parent, 'label')} and its --export, or "
            'add "ranks" (1 = best, ties allowed) to each line of this file; then '
            f"the same command goes on with it. {_as_it_is(kept)}"
        )
    if known.get("origin") != origin:
        raise UserError(
            f"{kept}: it was not sampled from this model with these settings; it is left as it is. "
            f"{_as_it_is(kept)} To sample anew, move it away."
        )
    try:
        _check(kept, known["rows"])
    except UserError as error:
        raise UserError(f"{error}\nIt is left as it is. {_as_it_is(kept)}") from None
    shutil.copyfile(kept, ranked)


def _as_it_is(kept: Path) -> str:
    return f'To train on a ranked file as it is: SET="rm.sampling=null rm.data.path={kept}"'


def _ranked_by_labeler(config: RMConfig, asking: Asking, ranked: Path) -> None:
    """Run the labeler on the samples and look at what it wrote."""
    assert config.sampling and config.sampling.labeler
    labeler, samples = config.sampling.labeler, ranked.with_name("to_rank.jsonl")
    there = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    if subprocess.run([sys.executable, "-c", there, labeler], capture_output=True).returncode:
        raise UserError(f"sampling.labeler: no module {labeler} where this command runs")
    if not samples.exists():
        write_atomically(samples, jsonl(_sample(asking)))
    unfinished = ranked.with_name("ranked.jsonl")
    unfinished.unlink(missing_ok=True)
    command = [sys.executable, "-m", labeler]
    command += ["--samples", str(samples), "--out", str(unfinished), "--seed", str(config.seed)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"the labeler failed: {' '.join(command)}\n{result.stderr.strip()}")
    if not unfinished.exists():
        raise UserError(f"the labeler {labeler} wrote nothing: {' '.join(command)}")
    keys = [_key(row.values) for row in read_rows(Data(path=str(samples)))]
    try:
        _check(unfinished, keys)
    except UserError as error:
        raise UserError(f"the labeler {labeler} does not keep to its samples: {error}") from None
    os.replace(unfinished, ranked)


def _check(ranked: Path, keys: list[str]) -> None:
    """UserError unless the file holds the samples of these keys, each once, and good ranks for all."""
    source = Data(path=str(ranked))
    rows = read_rows(source)
    if reason := _unlike(rows, keys) or _without_ranks(rows):
        raise UserError(f"{ranked}: {reason}")
    load_rankings(source, notes=[])  # what is wrong with ranks is told by their lines


def _key(row: dict[str, Any]) -> str:
    """What a ranked line has in common with its sample: prompt and responses, in any order."""
    responses = row.get("responses")
    texts = sorted(map(str, responses)) if isinstance(responses, list) else responses
    return hashlib.sha256(json.dumps([row.get("prompt"), texts]).encode()).hexdigest()


def _unlike(rows: list[Row], keys: list[str]) -> str | None:
    """Why these lines are not the samples, each once and unchanged; None when they are."""
    missing, foreign = Counter(keys), []
    for row in rows:
        key = _key(row.values)
        if missing[key] > 0:
            missing[key] -= 1
        else:
            foreign.append(row)
    told = []
    if foreign:
        told.append(f"{len(foreign)} lines are no samples or repeat one: {_places(foreign)}")
    if number := missing.total():
        told.append(f"{number} of {len(keys)} samples are missing or changed")
    return ", ".join(told) or None


def _without_ranks(rows: list[Row]) -> str | None:
    lacking = [row for row in rows if not is_ranked(row.values)]
    if not lacking:
        return None
    return f"{len(lacking)} of {len(rows)} lines have no ranks yet: {_places(lacking)}"


def _places(rows: list[Row]) -> str:
    shown = ", ".join(row.where.rpartition(":")[2] for row in rows[:20])
    return f"lines {shown}" + (" ..." if len(rows) > 20 else "")


def _sample(asking: Asking) -> list[dict]:
    """The prompts' rows with `prompt` (messages), `responses` (K texts) and `ended` (whether each ended
    itself), less what would be read in their place."""
    sampling, tokenizer = asking.sampling, asking.tokenizer
    for name in (asking.model, sampling.unsure):
        if name is not None and tokenizer_hash(load_tokenizer(name)) != tokenizer_hash(tokenizer):
            raise UserError(f"rm: sampling: {name} has another tokenizer than the SFT model")
    policy = load_policy(asking.model, tokenizer).to(device())
    prompts = _drawn(asking)
    columns = columns_of(prompts)
    sizes = _sizes(sampling.k, len(prompts), asking.seed)
    rows: list[dict] = []
    for start in tracked(range(0, len(prompts), sampling.batch_size), "sampling comparisons"):
        batch = prompts[start : start + sampling.batch_size]
        counts = sizes[start : start + sampling.batch_size]
        limits = sampling.max_new_tokens, sampling.temperature
        several = answers(policy, tokenizer, [p.messages for p in batch], counts, *limits)
        for prompt, own in zip(batch, several, strict=True):
            row = {name: prompt.row.get(name) for name in columns}
            row |= {"prompt": prompt.messages, "responses": [r.text for r in own]}
            rows.append(row | {"ended": [r.ended for r in own]})
    return rows if sampling.unsure is None else _least_sure(asking, rows)


def columns_of(prompts: Sequence[Prompt]) -> list[str]:
    """The columns that the rows of what is sampled keep."""
    return list(dict.fromkeys(n for p in prompts for n in p.row if n not in REPLACED))


def answers(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[Message]],
    counts: Sequence[int],
    max_new_tokens: int,
    temperature: float,
) -> list[list[Response]]:
    """So many sampled responses to each prompt, all in one batch."""
    ids = [encode_prompt(tokenizer, messages) for messages in prompts]
    repeated = [row for row, k in zip(ids, counts, strict=True) for _ in range(k)]
    responses = iter(
        generate(
            policy,
            tokenizer,
            repeated,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            batch_size=len(repeated),
        )
    )
    return [[next(responses) for _ in range(k)] for k in counts]


POOL = 4
"""Prompts drawn for each that a reward model then chooses."""


def _drawn(asking: Asking) -> Sequence[Prompt]:
    """The prompts to answer: all, or `count` (times POOL, of which as many are chosen) that nobody was asked."""
    sampling = asking.sampling
    prompts = load_prompts(sampling.prompts, seed=asking.seed)
    if sampling.count is None:
        return prompts
    new = [i for i, p in enumerate(prompts) if prompt_text(p.messages) not in asking.asked]
    if len(new) < sampling.count:
        raise UserError(
            f"rm: sampling.count {sampling.count}: {len(new)} of {len(prompts)} prompts have no ranking "
            "yet; lower it, or give more prompts"
        )
    wanted = sampling.count * (1 if sampling.unsure is None else POOL)
    return pick(prompts, sorted(random.Random(asking.seed).sample(new, min(wanted, len(new)))))


def _least_sure(asking: Asking, rows: list[dict]) -> list[dict]:
    """Those `count` rows that tell a Bradley-Terry model most: the mean of p (1 - p) over their pairs of
    different responses, p the reward model's belief that one beats the other."""
    assert asking.sampling.unsure and asking.sampling.count
    path, tokenizer = Path(asking.sampling.unsure), asking.tokenizer
    encoded = [encode_responses(tokenizer, row["prompt"], row["responses"]) for row in rows]
    pairs = [(prompt, response) for prompt, responses in encoded for response in responses]
    prompts, responses = map(list, zip(*pairs, strict=True))
    model = load_reward(path).to(device())
    bar = "sampling: what the reward model cannot tell"
    scores = iter(score_sequences(model, prompts, responses, pad_id(tokenizer), progress=bar))

    def tells(row: dict) -> float:
        scored = {text: next(scores) for text in row["responses"]}
        pairs = itertools.combinations(scored.values(), 2)
        beliefs = [1 / (1 + math.exp(-abs(a - b))) for a, b in pairs]  # of the better one: p >= 1/2
        return sum(p * (1 - p) for p in beliefs) / max(len(beliefs), 1)

    worth = [tells(row) for row in rows]
    best = sorted(range(len(rows)), key=lambda i: (-worth[i], i))[: asking.sampling.count]
    return [rows[i] for i in sorted(best)]


def _sizes(shares: dict[int, float], count: int, seed: int) -> list[int]:
    """K of each prompt, drawn with the configured shares."""
    return random.Random(seed).choices(list(shares), weights=list(shares.values()), k=count)
