"""A reward model's card against numbers made by hand, and of models that other programs made."""

import json

import pytest
import torch

import small_run
import tiny_models
from pipeline.errors import UserError
from pipeline.evaluation import report, rm
from pipeline.evaluation.card import card
from pipeline.evaluation.rankings import Scored
from pipeline.models.loading import load_reward


def item(ranks, scores, lengths, subset=None, prompt="p") -> Scored:
    row = None if subset is None else {"subset": subset}
    responses = [f"r{i}" for i in range(len(ranks))]
    return Scored(prompt, responses, ranks, lengths, scores, row)


ITEMS = [
    item([1, 2, 3], [3.0, 1.0, 2.0], [10, 10, 30], "chat", "first"),  # second and third swapped
    item([1, 2], [0.5, 0.5], [20, 5], "chat"),  # a tie of scores
    item([2, 1], [4.0, 1.0], [12, 11], "code", "third"),  # wrong, and lengths alike
]


def test_accuracies_of_all_pairs_and_of_parts():
    found = card(ITEMS)
    assert found["pairs"] == 5 and found["accuracy"] == pytest.approx((2 + 0 + 0.5 + 0) / 5)
    # longer wins: of (10, 10) half, (10, 30) no, (10, 30) no, (20, 5) yes, (11, 12) no
    assert found["longer_wins"] == pytest.approx(1.5 / 5) == 1 - found["shorter_wins"]
    assert found["above_length"]["margin"] == pytest.approx(2.5 / 5 - 3.5 / 5)
    assert (
        found["above_length"]["low"]
        <= found["above_length"]["margin"]
        <= found["above_length"]["high"]
    )
    assert found["length_matched"]["pairs"] == 2 and found["length_matched"]["accuracy"] == 0.5
    assert found["with_best"]["pairs"] == 4 and found["with_best"]["accuracy"] == 2.5 / 4
    assert found["without_best"]["accuracy"] == 0
    assert {k: v["pairs"] for k, v in found["by_k"].items()} == {"2": 2, "3": 3}
    assert {k: v["accuracy"] for k, v in found["by_distance"].items()} == {"1": 1.5 / 4, "2": 1.0}
    assert {k: v["accuracy"] for k, v in found["by_subset"].items()} == {
        "chat": 2.5 / 4,
        "code": 0.0,
    }


def test_errors_are_counted_and_the_widest_shown_first():
    errors = card(ITEMS)["errors"]
    assert errors["pairs"] == 2 and errors["longer_taken"] == 1.0
    assert [e["prompt"] for e in errors["examples"]] == ["third", "first"]
    assert errors["examples"][0]["better"] == {"response": "r1", "rank": 1, "score": 1.0}


def test_a_model_that_scores_everything_alike_has_one_half_everywhere():
    found = card([item(i.ranks, [0.0] * len(i.ranks), i.lengths, "x") for i in ITEMS])
    parts = [found, found["with_best"], *found["by_k"].values(), *found["by_subset"].values()]
    assert {part["accuracy"] for part in parts} == {0.5}
    assert found["errors"] == {"pairs": 0, "longer_taken": None, "examples": []}


def test_the_margin_over_length_is_that_of_the_better_rule_with_an_interval_of_prompts():
    good = [item([1, 2], [1.0, 0.0], [5, 6 + i % 2]) for i in range(40)]
    found = card(good)["above_length"]
    assert found == {"margin": 0.0, "low": 0.0, "high": 0.0}  # "the shorter one wins" does as well
    mixed = good + [item([1, 2], [1.0, 0.0], [9, 5]) for _ in range(40)]
    found = card(mixed)["above_length"]
    assert found["margin"] == 0.5 and 0.35 < found["low"] < 0.45 < 0.55 < found["high"] < 0.65


PAIRS = [
    {
        "prompt": f"w{i}",
        "chosen": f"w{i} w2",
        "rejected": "w3",
        "subset": "even" if i % 2 else "odd",
    }
    for i in range(4, 12)
]


def test_the_command_scores_files_of_pairs_by_subset_with_any_classifier(tmp_path, capsys):
    model = tiny_models.reward(3)
    model.save_pretrained(tmp_path / "rm")
    tiny_models.tokenizer().save_pretrained(tmp_path / "rm")
    file = small_run.write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    out = tmp_path / "card.json"
    rm.main(["--model", str(tmp_path / "rm"), "--data", str(file), "--out", str(out)])
    found = json.loads(out.read_text())
    right = []
    network, tokenizer = load_reward(tmp_path / "rm"), tiny_models.tokenizer()
    for row in PAIRS:
        texts = [
            f"<user> {row['prompt']} <bot> {row[side]} <end>" for side in ("chosen", "rejected")
        ]
        with torch.no_grad():
            a, b = (network(torch.tensor([tokenizer(t).input_ids])).logits.item() for t in texts)
        right.append(float(a > b))
    assert found["accuracy"] == pytest.approx(sum(right) / 8)
    assert found["by_subset"]["odd"]["accuracy"] == pytest.approx(sum(right[::2]) / 4)
    assert "all pairs" in capsys.readouterr().out


def test_what_is_too_long_is_left_out_and_nothing_left_is_refused(tmp_path, capsys):
    tiny_models.reward(3).save_pretrained(tmp_path / "rm")
    tiny_models.tokenizer().save_pretrained(tmp_path / "rm")
    file = small_run.write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    words = ["--model", str(tmp_path / "rm"), "--data", str(file), "--max-length"]
    with pytest.raises(UserError, match="no pair"):
        rm.main([*words, "5"])
    assert "8 responses are over 5 tokens" in capsys.readouterr().out


def test_the_report_shows_the_card(tmp_path):
    run = small_run.make_run(tmp_path)
    page = report.write_report(run).read_text(encoding="utf-8")
    assert "above that, 95 %" in page and "ranks apart: 1" in page and "pairs it has wrong" in page
