"""Two processes on CPU (gloo) get the numbers of one."""

import json
import operator
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import test_ppo_exact as exact
from pipeline.config.schema import Data
from pipeline.ppo import build
from pipeline.ppo.rollout import Query, Rollout

CHANGES = [
    {"whiten_rewards": True, "scale_scores": True, "ppo_epochs": 2, "micro_batch_size": 1},
    {"minibatches": 2, "ppo_epochs": 2},
    {"minibatches": 2, "ptx_coef": 0.5, "ptx_data": {"path": "none"}, "ptx_ratio": 3},
    {"minibatches": 2, "value": "shared", "sampler_correction": 2.0},
]


def texts(ppo) -> None:
    """The stream of pretraining text that a stage builds."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        rows = [{"text": " ".join(f"w{i}" for i in range(n, 20))} for n in range(12)]
        file.write("\n".join(map(json.dumps, rows)))
        file.flush()
        config = ppo.config.model_copy(update={"ptx_data": Data(path=file.name)})
        ppo.ptx = build._ptx(config, ppo.tokenizer, ppo.accelerator)


def updated_share(
    changes: dict, rank: int, processes: int
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Weights and metrics after an update in which this process holds its share of the episodes."""
    ppo = exact.make(**changes)
    if changes.get("ptx_coef"):
        texts(ppo)
    whole = exact.recorded(ppo)
    share = len(whole) // processes
    mine: Rollout = whole.rows(slice(rank * share, (rank + 1) * share))
    metrics = ppo.update(mine)
    return [p.detach() for p in ppo.networks.parameters()], metrics


def sampled_share(rank: int, processes: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Responses that this process samples to its share of the queries, and weights after it."""
    ppo = exact.make(old_logprobs="sampler")
    ppo.iteration = 1  # the reference differs from the policy on purpose
    ppo.score = lambda episodes: [
        float(len(ids)) for ids in map(operator.add, episodes.queries, episodes.response_ids)
    ]
    queries = [Query(ids) for ids in exact.QUERIES]
    share = len(queries) // processes
    torch.manual_seed(3)
    rollout = ppo.rollout(queries[rank * share : (rank + 1) * share])
    ppo.update(rollout)
    return rollout.response_ids(), [p.detach() for p in ppo.networks.parameters()]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = []
    for rank in range(2):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": os.pathsep.join([".", "tests", os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        command = [sys.executable, __file__, str(rank), str(tmp_path / f"{rank}.pt")]
        workers.append(subprocess.Popen(command, env=env, cwd=Path(__file__).parent.parent))
    assert [worker.wait(timeout=600) for worker in workers] == [0, 0]
    for number, changes in enumerate(CHANGES):
        weights, metrics = updated_share(changes, 0, 1)
        for rank in range(2):
            theirs = torch.load(tmp_path / f"{rank}.pt")
            for mine, other in zip(weights, theirs["weights"][number], strict=True):
                torch.testing.assert_close(other, mine, rtol=1e-9, atol=1e-12)
            assert theirs["metrics"][number] == pytest.approx(metrics, rel=1e-6, abs=1e-9)
    responses, weights = sampled_share(0, 1)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert both[0]["responses"] + both[1]["responses"] == responses
    for theirs in both:
        for mine, other in zip(weights, theirs["sampled_weights"], strict=True):
            torch.testing.assert_close(other, mine, rtol=1e-9, atol=1e-12)


if __name__ == "__main__":
    shares = [updated_share(changes, int(sys.argv[1]), 2) for changes in CHANGES]
    weights, metrics = zip(*shares, strict=True)
    responses, sampled = sampled_share(int(sys.argv[1]), 2)
    found = {"responses": responses, "sampled_weights": sampled}
    torch.save({"weights": weights, "metrics": metrics, **found}, sys.argv[2])
