"""The reward stage's data step: sample K responses a prompt from the SFT model, have them ranked.

Rankings travel through files: a labeler is another process that reads samples and writes ranks, so
nothing it knows can leak into training; people add theirs to `RUN/to_rank.jsonl`, which nothing here
ever overwrites or removes once it is not as it was written.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.config.schema import Data, RMConfig, Sampling
from pipeline.data.forms import PROMPTS, load_prompts
from pipeline.data.rankings import Ranking, load_rankings
from pipeline.data.sources import Row, read_rows
from pipeline.data.template import encode_prompt
from pipeline.errors import UserError
from pipeline.handoff import artifacts
from pipeline.handoff.lineage import inputs_of
from pipeline.models.device import device
from pipeline.models.generation import generate
from pipeline.models.loading import load_policy
from pipeline.process.files import jsonl, read_if_whole, sha256, write_atomically
from pipeline.process.progress import tracked

RECORD = ".to_rank.json"
"""Beside `RUN/to_rank.jsonl`: what was sampled, from what, and the hash of the file as it was written."""


def sampled_rankings(
    config: RMConfig, sft: Path, tokenizer: PreTrainedTokenizerBase, work: Path
) -> Sequence[Ranking]:
    """Rankings of the SFT model's own responses, kept in `work`; UserError until people have made them."""
    ranked = work / "rankings.jsonl"
    if not ranked.exists():
        by = _ranked_by_people if config.to_rank else _ranked_by_labeler
        by(config, sft, tokenizer, ranked)
    return load_rankings(Data(path=str(ranked)))


def _ranked_by_people(
    config: RMConfig, sft: Path, tokenizer: PreTrainedTokenizerBase, ranked: Path
) -> None:
    """Take the ranks that people have added, or write the samples and stop until they have."""
    assert config.sampling and config.to_rank
    kept, record = config.to_rank, config.to_rank.with_name(RECORD)
    origin, known = _origin(config, sft), read_if_whole(record)
    if kept.exists() and known.get("origin") != origin and known.get("file") == sha256(kept):
        kept.unlink()  # nobody has touched it, and this config samples something else
    if not kept.exists():
        rows = _sample(config.sampling, config.seed, sft, tokenizer)
        told = {"origin": origin, "rows": [_key(row) for row in rows]}
        text = jsonl(rows)
        told["file"] = hashlib.sha256(text.encode()).hexdigest()
        write_atomically(record, json.dumps(told))
        write_atomically(kept, text)
        raise UserError(
            f"{kept}: {len(rows)} prompts of {config.sampling.prompts.path} with sampled responses, to "
            'be ranked by people. Add "ranks" (1 = best, ties allowed) to each line of this file; then '
            f"the same command goes on with it. {_as_it_is(kept)}"
        )
    if known.get("origin") != origin:
        raise UserError(
            f"{kept}: it was not sampled from this SFT model with these settings; it is left as it is. "
            f"{_as_it_is(kept)} To sample anew, move it away."
        )
    try:
        _check(kept, known["rows"])
    except UserError as error:
        raise UserError(f"{error}\nIt is left as it is. {_as_it_is(kept)}") from None
    shutil.copyfile(kept, ranked)


def _origin(config: RMConfig, sft: Path) -> str:
    """Hash of all that decides what is sampled."""
    assert config.sampling is not None
    keys = config.sampling.model_dump(mode="json", exclude={"labeler"})
    keys["prompts"] |= {"path": sorted(inputs_of(config.sampling.prompts).values())}
    whole = [keys, config.seed, artifacts.manifest_hash(sft)]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _as_it_is(kept: Path) -> str:
    return f'To train on a ranked file as it is: SET="rm.sampling=null rm.data.path={kept}"'


def _ranked_by_labeler(
    config: RMConfig, sft: Path, tokenizer: PreTrainedTokenizerBase, ranked: Path
) -> None:
    """Run the labeler on the samples and look at what it wrote."""
    assert config.sampling and config.sampling.labeler
    labeler, samples = config.sampling.labeler, ranked.with_name("to_rank.jsonl")
    there = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    if subprocess.run([sys.executable, "-c", there, labeler], capture_output=True).returncode:
        raise UserError(f"sampling.labeler: no module {labeler} where this command runs")
    if not samples.exists():
        write_atomically(samples, jsonl(_sample(config.sampling, config.seed, sft, tokenizer)))
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
    lacking = [row for row in rows if not (row.values.get("ranks") or row.values.get("scores"))]
    if not lacking:
        return None
    return f"{len(lacking)} of {len(rows)} lines have no ranks yet: {_places(lacking)}"


def _places(rows: list[Row]) -> str:
    shown = ", ".join(row.where.rpartition(":")[2] for row in rows[:20])
    return f"lines {shown}" + (" ..." if len(rows) > 20 else "")


def _sample(
    sampling: Sampling, seed: int, sft: Path, tokenizer: PreTrainedTokenizerBase
) -> list[dict]:
    """The prompts' rows with `prompt` (messages), `responses` (K texts) and `ended` (whether each ended
    itself), less what would be read in their place."""
    policy = load_policy(sft, tokenizer).to(device())
    prompts = load_prompts(sampling.prompts, seed=seed)
    replaced = {*PROMPTS, "system", "history", "ranks", "scores"}
    columns = dict.fromkeys(name for p in prompts for name in p.row if name not in replaced)
    sizes = _sizes(sampling.k, len(prompts), seed)
    rows: list[dict] = []
    for start in tracked(range(0, len(prompts), sampling.batch_size), "sampling comparisons"):
        batch = prompts[start : start + sampling.batch_size]
        counts = sizes[start : start + sampling.batch_size]
        ids = [encode_prompt(tokenizer, p.messages) for p in batch]
        repeated = [row for row, k in zip(ids, counts, strict=True) for _ in range(k)]
        responses = generate(
            policy,
            tokenizer,
            repeated,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            batch_size=len(repeated),
        )
        for prompt, k in zip(batch, counts, strict=True):
            own, responses = responses[:k], responses[k:]
            row = {name: prompt.row.get(name) for name in columns}
            row |= {"prompt": prompt.messages, "responses": [r.text for r in own]}
            rows.append(row | {"ended": [r.ended for r in own]})
    return rows


def _sizes(shares: dict[int, float], count: int, seed: int) -> list[int]:
    """K of each prompt, drawn with the configured shares."""
    return random.Random(seed).choices(list(shares), weights=list(shares.values()), k=count)
