"""Judges are loaded by name and their answers are checked."""

import pytest

import small_run
from pipeline.errors import UserError
from pipeline.evaluation.judges import load_judge

ASKED = (["p", "q"], ["a", "b"], [{}, {}])


def loaded(monkeypatch, **functions):
    return load_judge(small_run.install(monkeypatch, small_run.judge_module(**functions)))


def test_no_judge_is_none():
    assert load_judge(None) is None


def test_scores_and_exact_come_back_as_plain_values(monkeypatch):
    judge = loaded(
        monkeypatch,
        score=lambda prompts, responses, rows, ended=None: [1, 2 if ended[1] else 0],
        exact=lambda prompts, responses, rows: [0, 1],
    )
    assert judge.score(*ASKED, [True, False]) == [1.0, 0.0]
    assert judge.exact(*ASKED) == [False, True]


def test_exact_is_optional(monkeypatch):
    assert loaded(monkeypatch).exact(*ASKED) is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda *a, **k: [1.0], "1 answers for 2 responses"),
        (lambda *a, **k: [1.0, float("nan")], "score 1 is nan"),
        (lambda *a, **k: 1 / 0, "ZeroDivisionError"),
        (lambda *a, **k: None, "TypeError"),
        (lambda *a, **k: [None, 1.0], "judge small_judge: score failed: TypeError"),
        (lambda *a, **k: ["good", "bad"], "judge small_judge: score failed: ValueError"),
    ],
)
def test_a_bad_answer_is_refused(monkeypatch, answer, said):
    judge = loaded(monkeypatch, score=answer)
    with pytest.raises(UserError, match=said):
        judge.score(*ASKED, [True, True])


def test_a_judge_with_a_mistake_in_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "own_judge.py").write_text("def score(prompts:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="cannot import 'own_judge' .SyntaxError"):
        load_judge("own_judge")


def test_names_that_are_no_judge():
    with pytest.raises(UserError, match=r"cannot import 'no\.such\.judge'"):
        load_judge("no.such.judge")
    with pytest.raises(UserError, match="json has no function score"):
        load_judge("json")


def test_gold_is_a_judge():
    judge = load_judge("pipeline.tiny.gold")
    assert judge is not None
    assert "preference" in judge.about
    assert judge.score([], [], [], []) == []
    assert judge.exact([], [], []) == []
