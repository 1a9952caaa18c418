"""Responses sampled for people to rank: of several models, resumed, blind, checked and scored."""

from collections import Counter

import pytest

import small_run
from pipeline.commands.label import of_chat
from pipeline.config.schema import Data
from pipeline.data.rankings import load_rankings
from pipeline.feedback import tasks
from pipeline.feedback.ratings import keep
from pipeline.feedback.store import Store
from pipeline.feedback.tasks import CHECK, Wanted, sample


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run.make_run(tmp_path_factory.mktemp("label"))


def wanted(run, **changes) -> Wanted:
    models = {name: run / name for name in ("sft", "ppo")}
    keys = {
        "models": models,
        "prompts": Data(path=str(run.parent / "prompts.jsonl")),
        "number": 12,
        "k": 5,
    }
    return Wanted(**keys | {"max_new_tokens": 6, "reward": run / "rm"} | changes)


def test_each_model_answers_its_share_and_nothing_tells_which(run, tmp_path):
    store = Store(tmp_path / "labels.db")
    assert sample(store, wanted(run)) == 12
    made = list(store.tasks().values())
    assert {task.row["answer"] for task in made} == {"w1"}
    assert sorted(task.prompt[0]["content"] for task in made) == sorted(
        row["prompt"] for row in small_run.PROMPTS
    )
    by = Counter(name for task in made for one in task.candidates for name in [one.source])
    assert by["sft"] > 20 and by["ppo"] > 20
    firsts = {task.candidates[0].source for task in made}
    assert {"sft", "ppo"} <= firsts
    assert all(one.score is not None for task in made for one in task.candidates)
    assert len({one.ended for task in made for one in task.candidates}) == 2
    assert sample(store, wanted(run)) == 0


def test_what_was_killed_goes_on_to_the_same_tasks(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "BATCH", 4)
    whole, cut = Store(tmp_path / "whole.db"), Store(tmp_path / "cut.db")
    sample(whole, wanted(run))
    once, calls = tasks._batch, []

    def killed(*args):
        calls.append(args[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return once(*args)

    monkeypatch.setattr(tasks, "_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        sample(cut, wanted(run))
    assert len(cut.tasks()) == 4
    assert sample(cut, wanted(run)) == 8
    assert calls == [0, 4, 4, 8]
    assert cut.tasks() == whole.tasks()


def test_a_share_of_the_tasks_checks_that_answers_are_read(run, tmp_path):
    store = Store(tmp_path / "labels.db")
    sample(store, wanted(run, checks=0.25))
    checks = [task for task in store.tasks().values() if task.last is not None]
    assert len(checks) == 3
    assert all(task.candidates[task.last].text == CHECK for task in checks)
    assert len({task.last for task in checks}) > 1


def test_what_was_said_in_a_chat_counts_once_beside_what_is_said_on_the_page(tmp_path):
    asked = [{"role": "user", "content": "w1"}]
    keep(tmp_path, asked, ["w2", "w3 w4"], ranks=[2, 1], model="ppo")
    keep(tmp_path, asked, ["w5"], rating=4, model="ppo")
    assert len(load_rankings(Data(path=str(tmp_path / "ratings.jsonl")), notes=[])) == 1
    store = Store(tmp_path / "labels.db")
    for _ in range(2):
        of_chat(store, tmp_path)
        [label] = store.labels()
        texts = [one.text for one in store.tasks()[label.task].candidates]
        assert dict(zip(texts, label.body["ranks"], strict=True)) == {"w2": 2, "w3 w4": 1}
