"""A published run of random tiny models with records as the stages write them, made in a second."""

import json
import sys
import types
from pathlib import Path

import pytest

import tiny_models
from pipeline.handoff.artifacts import Manifest, Parent, manifest_hash, publish

PARENTS = {"base": [], "sft": ["base"], "rm": ["sft"], "ppo": ["sft", "rm"]}
METRICS = {
    "base": {},
    "sft": {"validation_perplexity_before": 40.0, "validation_perplexity": 4.0, "examples": 90},
    "rm": {"accuracy_before": 0.5, "accuracy": 0.75, "length_baseline": 0.5, "reward_bias": 0.1},
    "ppo": {"score_before": 0.1, "score": 0.9, "kl": 2.5, "iterations": 3},
}
PROMPTS = [
    {"prompt": f"w{i} w{i + 1}", "family": "even" if i % 2 == 0 else "odd", "answer": "w1"}
    for i in range(12)
]


def judge_module(name: str = "small_judge", **functions) -> types.ModuleType:
    """A judge that likes the word w1 and an end; register it with `install`."""

    def score(prompts, responses, rows, ended=None):
        ends = ended or [True] * len(prompts)
        return [r.split().count("w1") + float(e) for r, e in zip(responses, ends, strict=True)]

    module = types.ModuleType(name)
    vars(module).update({"score": score, **functions})
    return module


def install(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType) -> str:
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def make_run(
    root: Path,
    stages: tuple[str, ...] = ("base", "sft", "rm", "ppo"),
    first_seed: int = 0,
    **configs: dict,
) -> Path:
    """`root/run` with these stages, `root/base`, and prompts in `root/prompts.jsonl`.

    `configs`: stage -> keys of its config.
    """
    run = root / "run"
    write_jsonl(root / "prompts.jsonl", PROMPTS)
    places = {name: root / "base" if name == "base" else run / name for name in PARENTS}
    for seed, name in enumerate(stages, first_seed):
        staging = root / f".staging-{name}"
        model = tiny_models.reward(seed) if name == "rm" else tiny_models.policy(seed)
        model.save_pretrained(staging)
        tiny_models.tokenizer().save_pretrained(staging)
        write_jsonl(staging / "metrics.jsonl", curve(name))
        if name == "rm":
            write_jsonl(staging / "held_out.jsonl", held_out())
        parents = {
            parent: Parent(path=str(places[parent]), manifest_sha256=manifest_hash(places[parent]))
            for parent in PARENTS[name]
            if parent in stages
        }
        config = {"seed": 3, "model": str(places["base"]), "kl_coef": 0.05, **configs.get(name, {})}
        manifest = Manifest(
            stage=name,
            config=config,
            inputs={"data/train.jsonl": "ab" * 32},
            parents=parents,
            seed=3,
            metrics=METRICS[name],
        )
        publish(staging, places[name], manifest)
    return run


def curve(stage: str) -> list[dict]:
    """A few lines of metrics.jsonl; a value that was NaN is null."""
    if stage == "ppo":
        names = ("objective/scores", "objective/kl", "objective/rlhf_reward", "policy/entropy_avg")
        names += ("val/explained_variance", "response/length", "loss/policy_avg", "val/ratio")
        return [
            {"step": s, "time": float(s)} | dict.fromkeys(names, s / 4 + 0.5) for s in (1, 2, 3)
        ]
    return [
        {"step": 1, "time": 1.0, "train/loss": 2.0, "train/accuracy": 0.5},
        {"step": 2, "time": 2.0, "train/loss": None, "train/accuracy": 0.6},
        {"step": 3, "time": 3.0, "train/loss": 1.0, "validation/loss": 1.2},
    ]


def held_out() -> list[dict]:
    """Two rankings that the model scores: of four untied pairs it has three right."""
    return [
        {
            "prompt": "w1",
            "responses": ["a", "b"],
            "ranks": [1, 2],
            "lengths": [3, 2],
            "scores": [1, 0],
        },
        {
            "prompt": "w2",
            "responses": ["a", "b", "c"],
            "ranks": [1, 1, 2],
            "lengths": [2, 2, 4],
            "scores": [2.0, -1.0, 0.5],
        },
        {
            "prompt": "w3",
            "responses": ["a", "b"],
            "ranks": [2, 1],
            "lengths": [1, 5],
            "scores": [0, 3],
        },
    ]
