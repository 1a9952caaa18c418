"""PPO timed against TRL's, and the other stages against TRL's trainers: `make bench`.

Both sides do equal work in turns, A B A B, each in a process of its own. Writes OUT/bench-SIZE.json
and .md.
"""

import argparse
import base64
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline.bench import machine, startup, table
from pipeline.bench.overlay import overlay
from pipeline.bench.shapes import CASES, GROWTH, SIZES, Case, draw, size_of
from pipeline.bench.turns import Answer, Worker, WorkerFailed
from pipeline.cli import reporting_errors
from pipeline.config.load import checkpoints_root
from pipeline.errors import UserError
from pipeline.process.files import write_atomically
from pipeline.process.progress import say

OVERLAY = Path(".venv-bench")
MODULES = {"ours": "pipeline.bench.ours", "theirs": "pipeline.bench.theirs"}
STEPS = 4
"""Optimizer steps of the other stages that are timed for each iteration of PPO."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


def main(argv: list[str] | None = None) -> None:
    """Command line of `make bench`."""
    args = parser().parse_args(argv)
    if args.iterations is None:
        args.iterations = SIZES[args.size].iterations
    if min(args.iterations, args.threads) < 1:
        raise UserError("--iterations and --threads are at least 1")
    if args.device == "cuda" and not machine.has_cuda():
        raise UserError("--device cuda: torch finds none here")
    whole: dict[str, Any] = {
        "size": args.size,
        "iterations": args.iterations,
        "machine": machine.describe(args.threads, args.device),
        "results": [],
    }
    say(f"bench: {whole['machine']}")
    for name in args.cases or SIZES[args.size].cases or [*CASES, "startup"]:
        if name == "startup":
            whole["startup"] = startup.measure()
        elif name == "growth":
            grow(whole, args)
        else:
            whole["results"].append(result_of(CASES[name], args))
        write(whole, args.out)
    print(Path(args.out, f"bench-{args.size}.md").read_text())


def parser() -> argparse.ArgumentParser:
    """Arguments of `make bench`."""
    names = [*CASES, "startup", "growth"]
    out = argparse.ArgumentParser(prog="python -m pipeline.bench", description=__doc__)
    out.add_argument("--size", default="S", choices=SIZES, help="of the models and the rollouts")
    out.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    out.add_argument(
        "--iterations",
        type=int,
        help=f"of PPO, after a warm-up; {STEPS}x optimizer steps; default: 5, L: 2",
    )
    out.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side")
    out.add_argument("--cases", nargs="+", choices=names, metavar="CASE")
    out.add_argument("--out", type=Path, default=checkpoints_root() / "bench")
    return out


def result_of(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a case, or say why not."""
    if case.precision == "bf16" and args.device == "cpu" and not machine.multiplies_bf16():
        return {"case": case.name, "not_run": "this CPU has no bf16 instructions"}
    say(f"bench: {case.name}: {case.title}")
    answers, failed = measure(case, args)
    if case.task == "ppo":
        refuse_unequal(draw(size_of(args.size), case.full).response_tokens, answers, failed)
    flops = max((answer["flops"] for answer in answers.pop("peak", [])), default=None)
    return {"case": case.name, "answers": answers, "failed": failed, "flops": flops}


def grow(whole: dict[str, Any], args: argparse.Namespace) -> None:
    """Our iteration as responses, batch and vocabulary grow; OUT/growth.svg beside the table."""
    rows = whole["growth"] = []
    for name, value in ((name, value) for name, values in GROWTH.items() for value in values):
        one = argparse.Namespace(**{**vars(args), "size": f"grows {name}={value}"})
        answers, failed = measure(CASES["full"], one, ["ours", "peak"])
        row = {"grows": name, "to": value, "failed": failed.get("ours", "")}
        if not failed:
            flops = max(answer["flops"] for answer in answers["peak"])
            least = table.floor_seconds(one.size, CASES["full"], flops)
            peak = max(answer["peak_mb"] for answer in answers["ours"])
            row |= {key: table.median(answers["ours"], key) for key in ("seconds", "cpu_seconds")}
            row |= {"floor": least, "peak_mb": peak}
        rows.append(row)
        write(whole, args.out)
    from pipeline.evaluation import plots  # imports matplotlib

    picture = plots.growth(rows).partition(",")[2]  # of a data URI
    (args.out / "growth.svg").write_bytes(base64.b64decode(picture))


def measure(
    case: Case, args: argparse.Namespace, sides: Sequence[str] = ()
) -> tuple[dict[str, list[Answer]], dict[str, str]]:
    """Answers of each side, warm-up left out, and the last words of a side that failed, which is out."""
    rounds = args.iterations * (1 if case.task == "ppo" else STEPS)
    sides = sides or ["ours", "theirs", *(["peak"] if case.task == "ppo" else [])]
    answers: dict[str, list[Answer]] = {side: [] for side in sides}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        if case.busy:
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(other.kill)
        workers = {side: stack.enter_context(started(side, case, args)) for side in sides}
        for number in range(-1, rounds + 1):  # -1: they get ready, 0: a warm-up
            for side, worker in workers.items():
                if side in failed:
                    continue
                try:
                    answer = worker.ready() if number < 0 else worker.turn()
                except WorkerFailed as error:
                    say(f"bench: {side} failed: {error}")
                    failed[side] = str(error)
                else:
                    answers[side] += [answer] if number > 0 else []
            if number > 0:
                last = {side: answers[side][-1] for side in sides if side not in failed}
                times = (f"{side} {answer['seconds']:.2f} s" for side, answer in last.items())
                say(f"bench: {case.name} {number}/{rounds}: {', '.join(times)}")
    return answers, failed


def refuse_unequal(drawn: int, answers: dict[str, list[Answer]], failed: dict[str, str]) -> None:
    """A side that sampled other lengths than were drawn is no comparison."""
    for side in MODULES:
        sampled = {answer["tokens"] for answer in answers[side]}
        if sampled - {drawn}:
            failed[side] = f"sampled {sorted(sampled)} tokens an iteration, not {drawn}"


def started(side: str, case: Case, args: argparse.Namespace) -> Worker:
    """A worker that gets ready."""
    path = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = {
        **ENVIRONMENT,
        "OMP_NUM_THREADS": str(args.threads),
    }
    if side == "theirs":
        environment["GOMP_SPINCOUNT"] = "300000"  # libgomp's default, which ours is not
        if case.task == "ppo":
            path.insert(0, str(overlay(OVERLAY)))
    environment["PYTHONPATH"] = os.pathsep.join(path)
    if args.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    words = [case.precision] if side == "peak" else [args.size, case.name]
    module = MODULES.get(side, "pipeline.bench.peak")
    return Worker(module, words, environment, args.out / f"{case.name}-{side}.log")


def write(whole: dict[str, Any], out: Path) -> None:
    """OUT/bench-SIZE.json and .md; after each case, so that a cut leaves what was measured."""
    path = out / f"bench-{whole['size']}.json"
    write_atomically(path, json.dumps(whole, indent=1) + "\n")
    write_atomically(path.with_suffix(".md"), table.markdown(whole))


if __name__ == "__main__":
    with reporting_errors():
        main()
