"""Where a run is: a bar on a terminal, plain lines elsewhere; nothing of what is quick."""

import io
import sys

import pytest
from rich.console import Console

import tiny_models
from pipeline.evaluation.likelihoods import sequence_logprobs
from pipeline.models.forward import score_sequences
from pipeline.models.generation import generate
from pipeline.process import progress
from pipeline.training.trainers import ShowsEvaluation


def test_lines_without_a_terminal_come_seldom_and_without_carriage_returns(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.track(1000, "ppo") as bar:
        for _ in range(1000):
            now[0] += 0.1
            bar.advance(1, kl=1.23456, note="x")
    told = capsys.readouterr().out
    assert 15 <= len(told.splitlines()) <= 25
    assert "\r" not in told
    assert told.splitlines()[-1] == "ppo  1000/1000  kl 1.23  note x"


def test_a_quick_loop_is_told_once(capsys):
    with progress.track(30, "ppo") as bar:
        for _ in range(30):
            bar.advance()
    assert capsys.readouterr().out == "ppo  30/30\n"


def test_items_that_take_long_are_told_and_quick_ones_not(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    assert list(progress.tracked("quick", "letters")) == list("quick")
    assert capsys.readouterr().out == ""
    for _ in progress.tracked(range(100), "rows"):
        now[0] += 0.1
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "rows  100/100"
    assert 5 <= len(told) <= 12


def test_one_process_of_several_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    progress.say("text")
    with progress.track(2, "ppo") as bar:
        bar.advance(2)
    assert capsys.readouterr().out == ""


def test_on_a_terminal_there_is_a_bar_and_lines_stand_above_it(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with progress.track(2, "ppo") as bar:
        bar.advance(1, kl=0.5)
        progress.say("text [not markup]")
    assert "text [not markup]" in capsys.readouterr().out


@pytest.fixture
def slow(monkeypatch) -> None:
    """Everything counts as long."""
    monkeypatch.setattr(progress, "SECONDS_UNTOLD", -1.0)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)


@pytest.mark.usefixtures("slow")
def test_sampling_scoring_and_likelihoods_tell_where_they_are(capsys):
    model, tokenizer = tiny_models.policy(0), tiny_models.tokenizer()
    prompts = [[2, 7, 3], [2, 8, 3], [2, 9, 3]]
    generate(model, tokenizer, prompts, max_new_tokens=2, batch_size=1, progress="answers")
    score_sequences(tiny_models.reward(1), prompts, [[4]] * 3, 0, batch_size=1, progress="scores")
    sequence_logprobs(model, prompts, [[4]] * 3, pad=0)
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == ["answers  1/3", "answers  2/3", "answers  3/3"]
    assert told[-1] == "eval: likelihoods  1/1"
    assert "scores  3/3" in told
    generate(model, tokenizer, prompts, max_new_tokens=2, batch_size=1)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("slow")
def test_a_held_out_loss_tells_where_it_is_each_time(capsys):
    shown = ShowsEvaluation("held-out loss")
    for _ in range(2):
        for _ in range(3):
            shown.on_prediction_step(None, None, None, eval_dataloader=[0] * 3)
        shown.on_evaluate(None, None, None)
        told = capsys.readouterr().out.splitlines()
        assert told == ["held-out loss  1/3", "held-out loss  2/3", "held-out loss  3/3"]


SECONDS = (  # of the iterations of a tiny PPO, as its record has them
    "0.97 0.99 1.34 0.98 0.97 0.98 0.91 1.02 0.82 0.82 0.86 1.06"
)


def recorded(name: str) -> list[float]:
    return [float(word) for word in name.split()]


def test_the_time_left_is_right_to_a_fifth_after_a_tenth(monkeypatch):
    """By a clock that goes as recorded iterations did, of a process that goes on after another's."""
    now, seconds = [100.0], recorded(SECONDS) * 3
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    told = []
    with progress.track(len(seconds) + 50, "ppo", 50) as bar:
        assert bar.seconds_left() is None
        for step, each in enumerate(seconds, 1):
            now[0] += each
            bar.advance()
            told.append((step, bar.seconds_left(), sum(seconds[step:])))
    later = [(left, true) for step, left, true in told if step * 10 >= len(seconds)]
    assert all(abs(left - true) <= 0.2 * true + 0.5 for left, true in later)


def test_the_time_left_is_told_in_minutes_and_one_stall_does_not_double_it(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.track(200, "ppo") as bar:
        for step in range(20):
            now[0] += 400.0 if step == 10 else 20.0
            bar.advance()
        assert bar.seconds_left() < 1.5 * 180 * 20
    lines = capsys.readouterr().out.splitlines()
    assert "left" not in lines[0] and lines[9].endswith("1 h 03 min left")


def test_a_terminal_shows_a_panel_of_courses():
    out = io.StringIO()
    bar = progress._rich_bar()
    task = bar.add_task("ppo", total=3, fields="kl 1.2", curves={"score": [0.0, 1.0, 7.0]})
    assert task == 0
    Console(file=out, force_terminal=False, width=100).print(*bar.get_renderables())
    assert "▁▂█" in out.getvalue() and "score" in out.getvalue() and "kl 1.2" in out.getvalue()


def test_a_course_of_what_is_no_number_or_never_moves():
    assert progress.spark([1.0, 1.0, float("nan")]) == "▁▁ "
    assert len(progress.spark(list(range(100)))) == 40
