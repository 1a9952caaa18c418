"""Sources that are larger than memory: the same results from the disk, in bounded memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_models
from pipeline.config.schema import Data, RMConfig, SFTConfig, Source
from pipeline.data import kept
from pipeline.data.forms import load_demonstrations, load_prompts, load_texts
from pipeline.data.rankings import load_rankings
from pipeline.data.splits import split_by_prompt
from pipeline.ppo.rollout import PromptStream, queries_of
from pipeline.process.files import sha256
from stages import rm, sft

SCRIPT = Path(__file__).parent / "large_data.py"


@pytest.fixture
def files(tmp_path):
    """Demonstrations, some with turns that are only read, and rankings; prompts come twice."""
    marked = {"role": "assistant", "content": "w3", "weight": 0}
    turns = [{"role": "user", "content": "w1"}, marked, {"role": "user", "content": "w2"}]
    rows = [{"prompt": f"w{n % 30} w{n // 30}", "completion": f"w{n}", "n": n} for n in range(50)]
    rows += [{"messages": [*turns, {"role": "assistant", "content": f"w{n}"}]} for n in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranked = [
        {"prompt": f"w{n} w{n % 3}", "chosen": "w1 w2", "rejected": f"w{n}"} for n in range(3, 45)
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    return Data(path=str(tmp_path / "a.jsonl")), Data(path=str(tmp_path / "b.jsonl"))


def both(monkeypatch, made):
    """What `made` makes from memory, and from the disk."""
    small = made()
    with monkeypatch.context() as patch:
        patch.setattr(kept, "MOST", 0)
        return small, made()


def test_items_on_the_disk_are_the_items(files, monkeypatch):
    for load, source in [
        *((load, files[0]) for load in (load_demonstrations, load_prompts, load_texts)),
        (load_rankings, files[1]),
    ]:
        small, large = both(monkeypatch, lambda load=load, source=source: load(source))
        assert isinstance(small, list) and not isinstance(large, list)
        assert list(large) == small and len(large) == len(small)
        assert (large[-1], large[3:5], large[::-7]) == (small[-1], small[3:5], small[::-7])
        with pytest.raises(IndexError):
            large[len(small)]


@pytest.mark.parametrize("seed", [1, 2])
def test_splits_mixtures_and_prompts_from_the_disk_are_the_same(files, monkeypatch, seed):
    weighted = Data(path=[Source(path=files[0].path, weight=1.5), Source(path=files[1].path)])
    for source in (*files, weighted):

        def made(source=source):
            prompts = load_prompts(source, seed=seed)
            training, held_out = split_by_prompt(prompts, 0.3, seed)
            stream = PromptStream(queries_of(tiny_models.tokenizer(), training), 4, seed)
            return list(training), list(held_out), [stream.batch(n) for n in range(20)]

        small, large = both(monkeypatch, made)
        assert small == large


def test_stages_publish_the_same_bytes_from_the_disk(files, monkeypatch, tmp_path):
    tiny_models.policy(0).save_pretrained(tmp_path / "base")
    tiny_models.tokenizer().save_pretrained(tmp_path / "base")
    quiet = {"wandb": {"mode": "disabled"}, "batch_size": 8, "learning_rate": 1e-2}

    def made():
        run = tmp_path / f"run{kept.MOST}"
        model = str(tmp_path / "base")
        one = SFTConfig(model=model, run=run, data=files[0], validation_fraction=0.2, **quiet)
        two = RMConfig(run=run, data=files[1], validation_fraction=0.3, **quiet)
        return [sha256(stage.run(c) / "model.safetensors") for stage, c in ((sft, one), (rm, two))]

    small, large = both(monkeypatch, made)
    assert small == large


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rows", "sft", "rm", "ppo"])
def test_memory_does_not_grow_with_the_rows(stage, tmp_path):
    def peak(megabytes: int) -> float:
        words = [sys.executable, str(SCRIPT), stage, str(megabytes), str(tmp_path)]
        env = os.environ | {"PYTHONPATH": f"{SCRIPT.parent.parent}:{SCRIPT.parent}"}
        done = subprocess.run(words, check=True, capture_output=True, text=True, env=env)
        return float(done.stdout)

    small, large = peak(20), peak(80)
    assert large - small < 20  # MB, of 60 more of rows; as Python's objects they take a multiple
