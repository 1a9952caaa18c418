"""Judges of pairs of answers: models, modules, a server and people; win rates and agreement."""

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

import judge_stub
import small_run
import tiny_models
from pipeline.config.evaluation import EvalConfig, JudgeConfig
from pipeline.config.schema import Data
from pipeline.errors import UserError
from pipeline.evaluation import anything, report, service, wins
from pipeline.evaluation.__main__ import run_evaluation
from pipeline.evaluation.panel import Contest, both_orders, judged, panel
from pipeline.evaluation.record import load_record
from pipeline.evaluation.rm import Scorer
from pipeline.evaluation.summary import judge_rows
from pipeline.evaluation.tallies import Answers
from pipeline.handoff.lineage import why_stale

KEY = "sk-THE/key+1234567890"
PAIRS = [("w1 w1", "w2"), ("w2", "w1"), ("w3", "w4"), ("w1", "w1"), ("w1", "w5")]


@pytest.fixture
def stub(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("RLHF_CHECKPOINTS", str(tmp_path / "ck"))
    monkeypatch.setattr(service, "BACKOFF", 0.001)
    with judge_stub.served() as stub:
        yield stub


def contest(pairs=PAIRS, **scores: tuple[list[float], list[float]]) -> Contest:
    """The i-th prompt is w<i>."""
    sides = [
        Answers(list(texts), [len(t.split()) + 1 for t in texts], [True] * len(texts))
        for texts in zip(*pairs, strict=True)
    ]
    for name, columns in scores.items():
        for side, column in zip(sides, columns, strict=True):
            side.grades[name] = column
    prompts = [[{"role": "user", "content": f"w{i}"}] for i in range(len(pairs))]
    return Contest(prompts, [{}] * len(pairs), *sides)


def config(*judges: dict, **keys) -> EvalConfig:
    return EvalConfig(prompts=Data(path="x"), judges=[JudgeConfig(**j) for j in judges], **keys)


def verdicts(judge: dict, pairs=PAIRS) -> tuple[list, dict]:
    [judging] = panel(config(judge)).values()
    return judging(contest(pairs))


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "ck").rglob("*.json"))


# --- a server ---------------------------------------------------------------------------------------


def test_a_server_is_asked_in_both_orders_and_never_twice(stub, tmp_path):
    judge = {"url": stub.url, "model": "big"}
    said, about = verdicts(judge)
    assert said == [1.0, 0.0, 0.5, 0.5, 1.0]
    assert about == {"swayed_by_order": 0.0, "unreadable": 0}
    assert len(stub.asked()) == 8  # equal texts are not asked about
    assert len(kept(tmp_path)) == 8
    headers = [headers["Authorization"] for _, headers, _ in stub.seen]
    assert set(headers) == {f"Bearer {KEY}"}
    assert stub.seen[1][2]["model"] == "big"
    stub.seen.clear()
    assert verdicts(judge)[0] == said and not stub.asked()
    assert len(verdicts({**judge, "model": "small"})[0]) == 5 and len(stub.asked()) == 8


def test_what_was_kept_is_enough_without_a_server(stub, capsys):
    judge = {"url": stub.url, "model": "big"}
    said, _ = verdicts(judge)
    stub.shutdown()
    stub.server_close()
    assert verdicts(judge)[0] == said
    assert "answers that were kept may do" in capsys.readouterr().out


def test_one_who_likes_what_comes_first_says_tie(stub):
    stub.answer = lambda question: "A"
    said, about = verdicts({"url": stub.url, "model": "big"})
    assert said == [0.5] * 5 and about["swayed_by_order"] == 1.0


def test_words_that_are_no_verdict_are_counted(stub):
    stub.answer = lambda question: "<think>A or B?</think> both are fine"
    said, about = verdicts({"url": stub.url, "model": "big"})
    assert said == [None, None, None, 0.5, None] and about["unreadable"] == 4
    rate = wins.rate(said, [0.0] * 5, list("abcde"))
    assert rate["judged"] == 1 and rate["rate"] == 0.5


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ("Answer A is a better one.", "Answer B is a better one.", 1.0),
        ("A.", "**B**", 1.0),
        ("b", "a", 0.0),
        ("It is a tie.", "It is a tie.", 0.5),
        ("A tie", "Tie.", 0.5),
        ("Neither is a good answer.", "B", None),
        ("A", "They give a similar quality", None),
    ],
)
def test_which_verdict_an_answer_means(first, second, verdict):
    said, about = both_orders(contest(PAIRS[:1]), lambda _: [first, second], ", or tie")
    assert said == [verdict] and about["unreadable"] == (verdict is None)
    assert about["swayed_by_order"] == 0


def test_an_answer_without_words_is_unreadable_and_asked_for_again(stub, tmp_path):
    judge = {"url": stub.url, "model": "big"}
    cut = {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}
    stub.troubles = [(200, json.dumps(cut), {})] * 8
    said, about = verdicts(judge)
    assert said == [None, None, None, 0.5, None] and about["unreadable"] == 4
    assert not kept(tmp_path)
    assert verdicts(judge)[0] == [1.0, 0.0, 0.5, 0.5, 1.0]


def test_a_damaged_file_of_an_answer_is_as_none(stub, tmp_path):
    judge = {"url": stub.url, "model": "big"}
    said, _ = verdicts(judge)
    damages = ["", "{", "[]", "[1]", "null", "{}", '{"answer": null}']
    for file, text in zip(kept(tmp_path), damages, strict=False):
        file.write_text(text)
    stub.seen.clear()
    assert verdicts(judge)[0] == said and len(stub.asked()) == len(damages)


def test_a_busy_server_is_asked_again_later(stub, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(service.time, "sleep", waits.append)
    monkeypatch.setattr(service, "AT_ONCE", 1)
    monkeypatch.setattr(service, "BACKOFF", 1.0)
    busy = (429, "slow down", {"Retry-After": "7"})
    stub.troubles = [(500, "", {}), (503, "", {}), busy]
    assert verdicts({"url": stub.url, "model": "big"})[0] == [1.0, 0.0, 0.5, 0.5, 1.0]
    assert waits == [1.0, 2.0, 7.0] and len(stub.asked()) == 11


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ((400, f"no such model, {KEY}", {}), r"HTTP 400: no such model, \(key\)"),
        ((401, "Incorrect key sk-T***7890", {}), "HTTP 401: the key is refused$"),
        ((302, "", {"Location": "http://127.0.0.1:9/elsewhere"}), "HTTP 302"),
        ((200, "<html>", {}), "no chat completion: '<html>'"),
        ((200, '{"choices": []}', {}), "no chat completion"),
        ((400, "e" * 290 + KEY, {}), r"HTTP 400: e+\(key\)$"),  # shown up to within the key
        ((200, "e" * 90 + KEY, {}), r"no chat completion: 'e+\(key\)'$"),
        ((400, f"wrong key {KEY[:9]}", {}), "HTTP 400: wrong key $"),
    ],
)
def test_what_cannot_be_mended_by_waiting_ends_it_in_a_line_without_the_key(stub, trouble, said):
    stub.troubles = [trouble] * 8
    with pytest.raises(UserError, match=said) as error:
        verdicts({"url": stub.url, "model": "big"})
    assert stub.url in str(error.value) and "\n" not in str(error.value)
    assert KEY[:6] not in str(error.value) and "7890" not in str(error.value)
    assert len(stub.asked()) <= service.AT_ONCE


def test_a_server_that_stays_down_ends_it_and_what_was_answered_is_kept(
    stub, tmp_path, monkeypatch
):
    monkeypatch.setattr(service, "AT_ONCE", 1)
    question = [f"{i}" for i in range(6)]
    one = service.Service(JudgeConfig(url=stub.url, model="m"), tmp_path / "ck")
    one.answers(question[:2])
    stub.troubles = [(500, "", {})] * 99
    with pytest.raises(UserError, match="HTTP 500, 5 times; what was answered is kept"):
        one.answers(question)
    assert len(kept(tmp_path)) == 2 and len(stub.asked()) == 2 + service.TRIES


def test_a_budget_is_kept(stub, tmp_path):
    judge = {"url": stub.url, "model": "m", "calls": 7}
    with pytest.raises(UserError, match="8 requests, and calls: 7; raise it, or ask less"):
        verdicts(judge)
    assert not stub.asked()  # told before the first
    stub.troubles = [(500, "", {})] * 4
    with pytest.raises(UserError, match=r"all 8 requests \(calls\) are spent"):
        verdicts({**judge, "calls": 8})
    assert len(stub.asked()) == 8
    stub.troubles.clear()
    assert verdicts({**judge, "calls": 8})[0] == [1.0, 0.0, 0.5, 0.5, 1.0]


def test_the_key_is_in_no_file_and_no_word(stub, tmp_path, capsys):
    stub.answer = lambda question: f"A {KEY}"
    verdicts({"url": stub.url, "model": "m"})
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 8 and not any(KEY in text for text in files)
    assert KEY not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({}, None, "OPENAI_API_KEY is not set"),
        ({"key": "MY_KEY"}, KEY, "MY_KEY is not set: export"),
        ({}, "two words", "what OPENAI_API_KEY holds is no key"),
        ({"url": "http://127.0.0.1:9/v1"}, KEY, "judges: http://127.0.0.1:9/v1: cannot be reached"),
        ({"url": "http://me:secret@host/v1"}, KEY, r"url host/v1: write it as https://host/v1"),
        ({"url": "https://host/v1?key=secret"}, KEY, r"url https://host/v1: write it as"),
        ({"url": "file:///etc/passwd"}, KEY, "write it as https://host/v1"),
    ],
)
def test_a_server_that_cannot_be_asked_is_told_before_anything_runs(
    monkeypatch, stub, changes, key, said
):
    monkeypatch.delenv("OPENAI_API_KEY")
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match=said) as error:
        panel(config({"url": stub.url, "model": "m", **changes}))
    assert "secret" not in str(error.value) and "words" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_server_without_a_key_gets_none(stub, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    verdicts({"url": stub.url, "model": "m", "key": None})
    assert not any("Authorization" in headers for _, headers, _ in stub.seen)


# --- the others -------------------------------------------------------------------------------------


def test_a_reward_model_prefers_what_it_scores_higher(tmp_path):
    tiny_models.reward(2).save_pretrained(tmp_path / "rm")
    tiny_models.tokenizer().save_pretrained(tmp_path / "rm")
    said, _ = verdicts({"reward": str(tmp_path / "rm")})
    score, asked = Scorer(tmp_path / "rm").of_answers, contest()
    first, second = (score(asked.prompts, s.texts) for s in (asked.first, asked.second))
    assert said == [float(a > b) + (a == b) / 2 for a, b in zip(first, second, strict=True)]
    assert said[3] == 0.5 and {0.0, 1.0} & set(said)


def test_a_local_model_prefers_the_likelier_letter(tmp_path):
    folder = tiny_models.saved_policy(tmp_path / "llm")
    said, about = verdicts({"llm": folder})
    assert len(said) == 5 and said[3] == 0.5
    assert set(said) <= {0.0, 0.5, 1.0} and 0 <= about["swayed_by_order"] <= 1
    right = lambda asked: ["A" if "[Answer A]\nw1" in question else "B" for question in asked]  # noqa: E731
    assert both_orders(contest(), right, "")[0] == [1.0, 0.0, 0.5, 0.5, 1.0]


def test_people_judge_the_answers_they_ranked(tmp_path, capsys):
    def vote(who: str, prompt: str, responses: list[str], ranks: list[int]) -> dict:
        return {"prompt": prompt, "responses": responses, "ranks": ranks, "annotator": who}

    rows = [
        vote("ann", "w0", ["w1 w1", "w2"], [1, 2]),
        vote("bob", "w0", ["w1 w1", "w2"], [2, 1]),
        vote("cem", "w0", ["w1 w1", "w2"], [1, 2]),
        vote("ann", "w1", ["w1", "w2 ", "w9"], [1, 2, 3]),
        vote("ann", "w2", ["w3", "w9"], [1, 2]),
        vote("ann", "w4", ["w5", "w1", "w9"], [1, 1, 2]),
    ]
    small_run.write_jsonl(tmp_path / "votes.jsonl", rows)
    said, _ = verdicts({"votes": str(tmp_path / "votes.jsonl")})
    assert said == [1.0, 0.0, None, None, 0.5]
    assert verdicts({"votes": str(tmp_path / "votes.jsonl")}, [("x", "y")] * 5)[0] == [None] * 5
    assert "none of these answers was ranked there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "exactly one of module, reward, llm, url, votes"),
        ({"llm": "a", "votes": "b"}, "exactly one of"),
        ({"url": "http://a/v1"}, "url and model go together"),
        ({"llm": "a", "model": "b"}, "url and model go together"),
        ({"llm": "a", "calls": 3}, "calls: of a url alone"),
    ],
)
def test_a_judge_is_one_thing(keys, said):
    with pytest.raises(ValidationError, match=said):
        JudgeConfig(**keys)


def test_names_are_told_apart_and_what_is_not_there_is_told(tmp_path):
    with pytest.raises(ValidationError, match="two are called 'a/b'"):
        config({"llm": "a/b"}, {"reward": "a/b"})
    with pytest.raises(UserError, match="reward rm: the run's own judges anyway"):
        panel(config({"reward": "rm"}))
    for judge in ({"reward": str(tmp_path)}, {"llm": str(tmp_path)}, {"module": "no.judge"}):
        with pytest.raises(UserError, match=r"cannot (load|import)"):
            panel(config(judge))
    with pytest.raises(UserError, match="no such file"):
        panel(config({"votes": str(tmp_path / "none.jsonl")}))


# --- what comes of it -------------------------------------------------------------------------------


def test_win_rates_and_agreement_by_hand():
    scores = {"judge": ([2.0, 0, 1, 1, 0], [1.0, 1, 1, 0, 1]), "rm_score": ([1.0] * 5, [0.0] * 5)}
    asked, samples = contest(**scores), [{} for _ in PAIRS]
    found = judged(
        asked, {"always": lambda _: ([1.0, 1.0, None, 1.0, 0.0], {"unreadable": 1})}, samples
    )
    gold = found["judges"]["judge"]
    assert (gold["wins"], gold["ties"], gold["losses"], gold["rate"]) == (2, 1, 2, 0.5)
    assert found["judges"]["always"]["judged"] == 4 and found["judges"]["always"]["unreadable"] == 1
    both = found["agreement"]["judge and always"]
    assert both["table"]["loss"] == {"win": 1, "tie": 0, "loss": 1}
    # win, loss, win, loss against win, win, win, loss: 3 of 4 alike, 1/2 * 3/4 + 1/2 * 1/4 by chance
    assert (both["judged"], both["same"], both["kappa"]) == (4, 0.75, 0.5)
    assert found["agreement"]["judge and reward model"]["kappa"] == 0  # who always says one word
    assert wins.agreement([1.0], [1.0])["kappa"] is None
    assert wins.agreement([1.0], [None])["judged"] == 0
    assert found["opposed"] == 2 and found["examples"][0]["prompt"] == "w1"
    assert samples[1] == {"verdicts": [{"judge": 0.0, "reward model": 1.0, "always": 1.0}]}
    assert judge_rows(found)[0][0::3] == ["judge", "2 / 1 / 2"]


def test_where_all_verdicts_are_alike_length_explains_nothing():
    found = wins.rate([1.0] * 6, [3.0, 1.0, -2.0, 4.0, 0.0, 5.0], range(6))
    equal = found["at_equal_length"]
    assert equal == {"value": 1.0, "low": found["low"], "high": found["high"]}
    assert equal["low"] < 0.7


def test_wins_at_equal_length_are_those_that_length_does_not_explain():
    longer, prompts = [3, 3, 3, 3, -3, -3, -3, -3] * 25, [str(i) for i in range(200)]
    by_length = [float(x > 0) for x in longer]
    assert wins.at_equal_length(by_length, longer, prompts)["value"] == pytest.approx(0.5, abs=1e-6)
    # 3 in 4 of those that are longer and 2 in 4 of the others win: half way between in logits
    better = [1, 1, 1, 0, 1, 1, 0, 0] * 25
    found = wins.rate(better, longer, prompts)
    assert found["rate"] == 0.625
    even = found["at_equal_length"]
    assert even["value"] == pytest.approx(3**0.5 / (1 + 3**0.5), abs=1e-3)
    assert even["low"] < even["value"] < even["high"] and even["high"] - even["low"] < 0.2
    assert wins.at_equal_length([0.5] * 3, [1, 0, 5], "abc")["value"] == pytest.approx(0.5)
    alike = wins.at_equal_length([1.0, 0, 1, 1], [3.0] * 4, "abcd")
    assert alike["value"] == pytest.approx(0.75, abs=0.01)  # nothing to tell the two apart by
    whole = wins.at_equal_length(better, longer, [str(i // 8) for i in range(200)])
    assert whole["low"] == pytest.approx(whole["high"])  # every prompt's rows are the same


def test_a_run_is_judged_by_all_and_the_report_shows_it(stub, tmp_path, monkeypatch):
    judge = small_run.install(monkeypatch, small_run.judge_module())
    run = small_run.make_run(tmp_path)
    tiny_models.reward(7).save_pretrained(tmp_path / "other")
    tiny_models.tokenizer().save_pretrained(tmp_path / "other")
    keys = {"prompts": Data(path=str(tmp_path / "prompts.jsonl")), "judge": judge}
    keys |= {"max_new_tokens": 6, "candidates": 1, "threads": 1}
    others = [
        JudgeConfig(reward=str(tmp_path / "other"), name="held-out"),
        JudgeConfig(url=stub.url, model="big"),
    ]
    assert "judges" not in EvalConfig(**keys).model_dump()
    whole = EvalConfig(**keys, judges=others)
    result = run_evaluation(run, whole)
    found = result["judges"]["ppo_vs_sft"]
    assert list(found["judges"]) == ["judge", "reward model", "held-out", "big"]
    assert found["judges"]["judge"]["rate"] == result["comparisons"]["ppo_vs_sft"]["rate"]
    assert (
        found["judges"]["reward model"]["wins"] == result["comparisons"]["ppo_vs_sft_by_rm"]["wins"]
    )
    assert len(found["agreement"]) == 6
    sample = json.loads((run / "eval/test_samples.jsonl").read_text().splitlines()[0])
    assert list(sample["verdicts"][0]) == list(found["judges"])
    page = report.render(load_record(run))
    assert "Judges: ppo over sft" in page and "Cohen&#39;s κ" in page and "held-out" in page
    assert why_stale("eval", whole, run) is None
    weights = tmp_path / "other" / "config.json"
    weights.write_text(weights.read_text() + " ")
    assert "other/config.json has changed" in str(why_stale("eval", whole, run))


def test_any_model_is_judged_against_the_first_or_the_references(stub, tmp_path, capsys):
    rows = [{"prompt": f"w{i}", "completion": "w1 w1 w1"} for i in range(4)]
    data = str(small_run.write_jsonl(tmp_path / "rows.jsonl", rows))
    models = [tiny_models.saved_policy(tmp_path / name / "sft") for name in "ab"]
    judge = json.dumps([{"url": stub.url, "model": "big"}])
    words = ["--data", data, f"eval.judges={judge}", "eval.max_new_tokens=4"]
    anything.main([*words, "--model", *models])
    [file] = (tmp_path / "ck" / "eval").glob("*.json")
    found = json.loads(file.read_text())["judges"]["b-sft_vs_a-sft"]["judges"]["big"]
    assert (found["judged"], found["ties"]) == (4, 4)  # the same model
    anything.main([*words, "--model", models[0]])
    found = json.loads((tmp_path / "ck/eval/a-sft-rows.json").read_text())["judges"]
    assert found["a-sft_vs_reference"]["judges"]["big"]["losses"] == 4
    assert math.isclose(found["a-sft_vs_reference"]["judges"]["big"]["rate"], 0)
    assert "b-sft over a-sft" in capsys.readouterr().out
