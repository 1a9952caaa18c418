"""Stage 3: PPO of the SFT model against the reward.

`python -m stages.ppo --config configs/tiny/ppo.yaml --run checkpoints/tiny [key=value ...]`
"""

from pipeline import cli

if __name__ == "__main__":
    cli.main("ppo")  # checks config and data before the slow imports below

import copy
import functools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.ppo import PPOConfig
from pipeline.data.forms import load_prompts
from pipeline.data.kept import pick
from pipeline.data.lengths import over_limit
from pipeline.data.literals import tell_spelled
from pipeline.data.template import template_hash, tokenizer_hash
from pipeline.engines.shares import from_all
from pipeline.engines.start import anywhere, check_started, together
from pipeline.engines.whole import plain
from pipeline.errors import UserError
from pipeline.handoff import checkpoint
from pipeline.models.adapters import ADAPTER, add_lora, merged, save_adapter
from pipeline.models.causal import places
from pipeline.models.dtypes import check_dtype
from pipeline.models.forward import layout
from pipeline.models.loading import load_policy, prepare_cpu, quiet
from pipeline.ppo import preflight
from pipeline.ppo.alarms import Alarms
from pipeline.ppo.build import build_ppo, check_divides
from pipeline.ppo.measures import Clock
from pipeline.ppo.rollout import PromptStream, Query
from pipeline.ppo.trainer import PPO
from pipeline.ppo.watch import Watch
from pipeline.process import faults, stopping
from pipeline.process.memory import peak_mb, relieved_by
from pipeline.process.progress import say, track
from pipeline.run import StageRun, by_source, given
from pipeline.tracking.tracker import read_rows


def run(config: PPOConfig, dataset: Any = None) -> Path:
    """Refine the SFT policy and publish `RUN/ppo`; returns that directory.

    `dataset` replaces `config.prompts` by prompts in memory.
    """
    check_divides(config)
    check_dtype(config.dtype)
    prompts = load_prompts(given(config.prompts, dataset, "prompts"), seed=config.seed)
    check_started(config)
    with StageRun(config, dataset) as stage:
        together()  # the first has tidied up
        tracker = stage.tracker
        begun = tracker.metrics_path.exists()  # what the gates found was told then
        preflight.check(config, stage.parents, None if begun else tracker.alert)
        quiet()
        prepare_cpu(config.threads)
        checkpoint.seed_everything(config.seed)
        ppo = build_ppo(config, stage.parent("sft"), stage.parent("rm"))
        queries = _short_enough(ppo.queries(prompts), config)
        _check_room(ppo, queries)
        said = (m["content"] for prompt in prompts for m in prompt.messages)
        tell_spelled("ppo: prompts", ppo.tokenizer, said)
        stream = PromptStream(queries, config.batch_size, config.seed, config.samples_per_prompt)
        watch = Watch(config, ppo, queries, tracker)

        _resume(ppo, stage)
        alarms = Alarms(config.alarms, read_rows(tracker.metrics_path), tracker.alert)
        with track(config.iterations, "ppo", ppo.iteration) as bar, stopping.deferred():
            while ppo.iteration < config.iterations:
                faults.at("eval", ppo.iteration)
                watch.samples()
                metrics = iteration(ppo, stream, watch)
                faults.at("step", ppo.iteration)
                metrics |= alarms(ppo.iteration, metrics)
                over = config.kl_limit is not None and metrics["objective/kl"] > config.kl_limit
                edge = over or ppo.iteration in (1, config.iterations)
                if edge or ppo.iteration % config.log_every == 0:
                    tracker.log(ppo.iteration, metrics)
                bar.advance(1, _panel(metrics), **_headline(metrics))
                if over:
                    say(f"ppo: stopped, KL {metrics['objective/kl']:.2f} is over {config.kl_limit}")
                    break
                _save_state(ppo, stage)
            watch.samples(last=True)

        _save(ppo, stage.parent("sft"), stage.output if stage.main else None)
        return stage.publish(
            {**_summary(stage.work / "metrics.jsonl"), **by_source(prompts)},
            tokenizer_hash(ppo.tokenizer),
            template_hash(ppo.tokenizer),
        )


def iteration(ppo: PPO, stream: PromptStream, watch: Watch) -> dict[str, float]:
    """Prompt to loss: sample queries, generate and score responses, optimise on them."""
    clock, accelerator = Clock(), ppo.accelerator
    queries = stream.batch(ppo.iteration, accelerator.process_index, accelerator.num_processes)
    with clock("rollout"), relieved_by("rollout_batch_size"):
        rollout = ppo.rollout(queries)
        if faults.at("rollout", ppo.iteration + 1):
            rollout.scores.fill_(float("nan"))
    with clock("update"):
        metrics = ppo.update(rollout)
    watch.histograms(rollout)
    watch.tokens(rollout, metrics["objective/kl_coef"])
    return {**metrics, **clock.seconds, "memory/peak_mb": peak_mb()}


def _short_enough(queries: Sequence[Query], config: PPOConfig) -> Sequence[Query]:
    """Queries of at most `max_prompt_length` tokens; UserError when too many are longer."""
    limit, lengths = config.max_prompt_length, array("q", (len(query.ids) for query in queries))
    over_limit("ppo: prompts", lengths, "max_prompt_length", limit, config.too_long)
    return pick(queries, (at for at, length in enumerate(lengths) if length <= limit))


def _check_room(ppo: PPO, queries: Sequence[Query]) -> None:
    """UserError when the model has too few places for a prompt and its response, and the EOS that a reward
    model reads after one that was cut off."""
    policy, new = ppo.networks.policy, ppo.config.max_new_tokens
    longest = max(len(query.ids) for query in queries)
    if (room := layout(policy).room(policy, longest) - 1) < new:
        raise UserError(
            f"ppo: a prompt of {longest} tokens leaves {max(room, 0)} places of the model's "
            f"{places(policy)} for its response; lower max_new_tokens ({new}) or max_prompt_length"
        )


def _resume(ppo: PPO, stage: StageRun) -> None:
    newest = checkpoint.newest(stage.work)
    faults.at("load", 0 if newest is None else checkpoint.step_of(newest))
    weight = next(p for p in ppo.networks.parameters() if p.requires_grad)
    faults.watch_gradient(weight, lambda: ppo.iteration + 1)
    if newest is not None:
        ppo.load_state_dict(checkpoint.load(newest, ppo.config.seed))
        stage.tracker.truncate(ppo.iteration)
        say(f"ppo: goes on after iteration {ppo.iteration}")


def _save_state(ppo: PPO, stage: StageRun) -> None:
    """Save the training state when it is time or a SIGTERM has come, and then end the process."""
    asked = anywhere(stopping.asked())
    due = ppo.iteration % ppo.config.save_every == 0 or ppo.iteration == ppo.config.iterations
    if due or asked:
        state, random = ppo.state_dict(), from_all([checkpoint.random_state()])
        if stage.main:
            stage.tracker.sync()
            checkpoint.save(stage.work, ppo.iteration, state, random)
    if asked:
        together()
        stopping.leave("ppo", ppo.iteration)


def _save(ppo: PPO, sft: Path, output: Path | None) -> None:
    """The policy, adapters merged, and beside it its moving average if one was kept; the first process alone
    has an `output`, but all may have parts of the weights."""
    policy, base = ppo.networks.policy, functools.partial(load_policy, sft, ppo.tokenizer)

    def alone() -> Any:
        dtype = ppo.config.dtype if ppo.config.lora else "fp32"
        return add_lora(base(dtype), ppo.config.lora, "CAUSAL_LM")

    def write(trained: Any, folder: Path) -> None:
        merged(trained, base).save_pretrained(folder)
        ppo.tokenizer.save_pretrained(folder)

    if ppo.config.ema_decay is not None:
        with ppo.ema.swapped_in(ppo.networks.policy_parameters()):
            average = plain(policy, alone)
            if output is not None:
                write(copy.deepcopy(average), output / "ema")
    trained = plain(policy, alone)
    if output is not None:
        if ppo.config.lora is not None:
            save_adapter(trained, output / ADAPTER)
        write(trained, output)


def _summary(record: Path) -> dict[str, float]:
    """First iteration against the mean of the last five that were recorded, itself not among them."""
    lines = read_rows(record)
    last = lines[1:][-5:] or lines

    def after(name: str) -> float:
        return sum(line[name] for line in last) / len(last)

    return {
        "score_before": lines[0]["objective/scores"],
        "score": after("objective/scores"),
        "kl": after("objective/kl"),
        "response_length_before": lines[0]["response/length"],
        "response_length": after("response/length"),
        "iterations": lines[-1]["step"],
        "episodes": lines[-1]["episode"],
    }


def _headline(metrics: dict[str, float]) -> dict[str, float]:
    return {
        "kl": metrics["objective/kl"],
        "score": metrics["objective/scores"],
        "length": metrics["response/length"],
    }


def _panel(metrics: dict[str, float]) -> dict[str, float]:
    """What a person on a terminal watches the course of."""
    names = {
        "score": "objective/scores",
        "KL to SFT": "objective/kl",
        "entropy": "policy/entropy_avg",
        "length": "response/length",
        "cut off": "response/truncated",
        "clipped": "policy/clipfrac_avg",
        "explained variance": "val/explained_variance",
        "learning rate": "lr",
    }
    found = {title: metrics[name] for title, name in names.items() if name in metrics}
    return found | {"seconds": metrics["time/rollout"] + metrics["time/update"]}
