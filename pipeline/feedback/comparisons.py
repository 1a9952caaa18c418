"""The reward stage's data step: sample K responses a prompt from the SFT model, have them ranked.

Rankings travel through files, as they do when people make them: the labeler is another process
that reads samples and writes ranks, so nothing it knows can leak into training.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pipeline.config.schema import Data, RMConfig, Sampling
from pipeline.data.forms import load_prompts
from pipeline.data.rankings import Ranking, load_rankings
from pipeline.data.template import encode_prompt
from pipeline.errors import UserError
from pipeline.models.generation import generate
from pipeline.models.loading import load_policy
from pipeline.process.progress import track


def sampled_rankings(
    config: RMConfig, sft: Path, tokenizer: PreTrainedTokenizerBase, work: Path
) -> list[Ranking]:
    """Rankings of the SFT model's own responses; kept in `work` for a restart."""
    assert config.sampling is not None
    ranked = work / "rankings.jsonl"
    if not ranked.exists():
        samples = work / "to_rank.jsonl"
        _write(samples, _sample(config.sampling, config.seed, sft, tokenizer))
        _rank(config, samples, ranked)
    return load_rankings(Data(path=str(ranked)))


def _sample(
    sampling: Sampling, seed: int, sft: Path, tokenizer: PreTrainedTokenizerBase
) -> list[dict]:
    """Rows of `prompt` (messages), `responses` (K texts) and `ended` (whether each ended itself)."""
    policy = load_policy(sft, tokenizer)
    prompts = load_prompts(sampling.prompts)
    sizes = _sizes(sampling.k, len(prompts), seed)
    rows: list[dict] = []
    with track(len(prompts), "sampling comparisons") as bar:
        for start in range(0, len(prompts), sampling.batch_size):
            batch = prompts[start : start + sampling.batch_size]
            counts = sizes[start : start + sampling.batch_size]
            ids = [encode_prompt(tokenizer, p.messages) for p in batch]
            repeated = [row for row, k in zip(ids, counts, strict=True) for _ in range(k)]
            responses = iter(
                generate(
                    policy,
                    tokenizer,
                    repeated,
                    max_new_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    batch_size=len(repeated),
                )
            )
            for prompt, k in zip(batch, counts, strict=True):
                own = [next(responses) for _ in range(k)]
                rows.append(
                    {
                        "prompt": prompt.messages,
                        "responses": [response.text for response in own],
                        "ended": [response.ended for response in own],
                    }
                )
            bar.advance(len(batch))
    return rows


def _sizes(shares: dict[int, float], count: int, seed: int) -> list[int]:
    """K of each prompt, drawn with the configured shares."""
    return random.Random(seed).choices(list(shares), weights=list(shares.values()), k=count)


def _rank(config: RMConfig, samples: Path, ranked: Path) -> None:
    """Run the labeler, or stop and say what people have to do."""
    assert config.sampling is not None
    if config.sampling.labeler is None:
        kept = config.run / "to_rank.jsonl"
        shutil.copyfile(samples, kept)
        raise UserError(
            f"{kept}: {config.sampling.prompts.path}'s prompts with sampled responses, to be ranked by "
            'people. Add "ranks" (1 = best, ties allowed) to each line, then run this stage with '
            f"sampling=null data.path={kept}"
        )
    unfinished = ranked.with_suffix(".tmp")
    command = [sys.executable, "-m", config.sampling.labeler]
    command += ["--samples", str(samples), "--out", str(unfinished), "--seed", str(config.seed)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"the labeler failed: {' '.join(command)}\n{result.stderr.strip()}")
    os.replace(unfinished, ranked)


def _write(path: Path, rows: list[dict]) -> None:
    """JSONL, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    os.replace(temporary, path)
