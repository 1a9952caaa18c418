"""The recipe that describes restaurants: its rule on sentences of people, its splits, its intervals."""

import csv
import json

import pytest

import small_run
from configs.e2e import judged, prepare, rule
from configs.e2e.judged import versus
from pipeline.config.evaluation import EvalConfig
from pipeline.config.load import load_config
from pipeline.config.schema import Data
from pipeline.data.forms import load_demonstrations, load_prompts
from pipeline.data.rankings import load_rankings
from pipeline.evaluation.__main__ import run_evaluation
from pipeline.evaluation.judges import load_judge
from pipeline.evaluation.wins import bootstrap, interval

FULL = (
    "name[The Mill], eatType[pub], food[Indian], priceRange[less than £20], customer rating[low], "
    "area[riverside], familyFriendly[no], near[Café Rouge]"
)
COFFEE = "name[Blue Spice], eatType[coffee shop], area[city centre]"
FAMILY = "name[Zizzi], eatType[restaurant], priceRange[high], customer rating[3 out of 5], familyFriendly[yes]"
NAMED = "name[Cocum], eatType[coffee shop], near[Raja Indian Cuisine]"
MIDDLE = "name[Strada], eatType[pub], food[Fast food], priceRange[£20-25], customer rating[5 out of 5], familyFriendly[no]"

JUDGED = [
    # (attributes, text, slots not said, what is wrong)
    (
        FULL,
        "The Mill is a cheap Indian pub by the river, near Café Rouge. Customers rate it low and it is not family-friendly.",
        "",
        "",
    ),
    (
        FULL,
        "Near Cafe Rouge in the riverside area there is an adults only pub, The Mill: Indian food under £20, poor reviews.",
        "",
        "",
    ),
    (
        FULL,
        "The Mill is a pub near Café Rouge.",
        "food priceRange customer rating area familyFriendly",
        "",
    ),
    (
        FULL,
        "The Mill is a child friendly Indian pub on the riverside near Café Rouge with low prices and a low customer rating.",
        "familyFriendly",
        "familyFriendly",
    ),
    (
        FULL,
        "The Mill, a low-priced Indian pub in the city centre near Café Rouge, has a high customer rating. No kids allowed.",
        "customer rating area",
        "customer rating area",
    ),
    (COFFEE, "Blue Spice is a coffee shop in the city centre.", "", ""),
    (COFFEE, "blue spice is a city centre coffee shop", "", ""),
    (
        COFFEE,
        "Blue Spice is a coffee shop in the centre of the city, owned by Giovanni since 1987.",
        "",
        "name:giovanni number:1987",
    ),
    (
        COFFEE,
        "Blue Spice is a cheap, kid friendly coffee shop in the city centre.",
        "",
        "priceRange familyFriendly",
    ),
    (COFFEE, "The Punter is a coffee shop in the city centre.", "name", "name:punter"),
    (COFFEE, "Blue Spice is a pub in the city centre.", "eatType", "eatType"),
    (
        FAMILY,
        "Families are welcome at Zizzi, an expensive restaurant rated three out of five.",
        "",
        "",
    ),
    (
        FAMILY,
        "Zizzi is a 3 star restaurant with a high price range where you can bring your kids.",
        "",
        "",
    ),
    (
        FAMILY,
        "Zizzi is a highly rated, high priced restaurant. It is great for families.",
        "customer rating",
        "customer rating",
    ),
    (
        FAMILY,
        "Zizzi is a restaurant. It isn't expensive and isn't suitable for children.",
        "priceRange customer rating familyFriendly",
        "priceRange familyFriendly",
    ),
    (NAMED, "Cocum is a coffee shop near Raja Indian Cuisine.", "", ""),  # which is no Indian food
    (NAMED, "Cocum is an Indian coffee shop near Raja Indian Cuisine.", "", "food"),
    (NAMED, "Cocum is a coffee shop by the river near Raja.", "near", "area"),
    (
        MIDDLE,
        "Strada is a pub serving fast food for £20-25. It has 5 out of 5 stars and is non family friendly.",
        "",
        "",
    ),
    (
        MIDDLE,
        "Strada, a moderately priced fast food pub with an excellent customer rating, does not welcome families.",
        "",
        "",
    ),
    (
        MIDDLE,
        "Strada sells Chinese fast food for over £30.",
        "eatType priceRange customer rating familyFriendly",
        "food priceRange",
    ),
    (MIDDLE, "", "name eatType food priceRange customer rating familyFriendly", ""),
]


@pytest.mark.parametrize(("prompt", "text", "missing", "wrong"), JUDGED)
def test_the_rule_reads_what_a_person_reads(prompt, text, missing, wrong):
    verdict = rule.read(prompt, text)
    slots = rule.attributes(prompt)
    assert {slot for slot in slots if slot in missing} == slots.keys() - verdict.said
    assert " ".join(verdict.wrong) == wrong


def test_a_score_takes_off_what_is_added_and_a_missing_end():
    texts = [
        "Blue Spice is a coffee shop in the city centre.",
        "Blue Spice is a coffee shop.",
        "Blue Spice is a cheap coffee shop in the city centre.",
        "Blue Spice is a coffee shop in the city centre.",
    ]
    judge = load_judge("configs.e2e.rule")
    rows = [{}] * 4
    assert judge.score([COFFEE] * 4, texts, rows, [True, True, True, False]) == pytest.approx(
        [1, 2 / 3, 2 / 3, 0.75]
    )
    assert judge.exact([COFFEE] * 4, texts, rows) == [True, False, False, True]
    with pytest.raises(ValueError, match="no attributes"):
        rule.read("the weather", "It rains.")


def rated(mr: str, texts: list[str], *ratings: list[int]) -> list[dict[str, str]]:
    """Rows of the csv: five texts, rated by some people."""
    return [
        {"mr": mr, "mr_id": "1", **{f"ref{i + 1}": text for i, text in enumerate(texts)}}
        | {f"quality{i + 1}": str(rating) for i, rating in enumerate(row)}
        for row in ratings
    ]


def test_raters_of_the_same_texts_are_one_ranking():
    texts = ["one", "two ", "three", "two", "five"]
    [found] = prepare.rankings(rated("name[A]", texts, [100, 44, 63, 60, 0], [80, 40, 62, 60, 21]))
    assert found["responses"] == ["one", "two", "three", "five"]
    assert found["scores"] == [90, 50, 60, 10]  # 90, 51, 62.5, 10.5
    assert found["raters"] == 2


def test_an_attribute_list_is_in_one_part_and_stays_there(tmp_path):
    rows = []
    for i in range(300):
        mr, texts = f"name[Place {i}], eatType[pub]", [f"Place {i} is pub {k}." for k in range(5)]
        rows += rated(mr, texts, [90, 80, 70, 60, 50], [72, 94, 66, 54, 38])
        rows += rated(mr, [t + " Yes." for t in texts], [50, 50, 50, 50, 50])  # prefers nothing
    with (tmp_path / "quality.csv").open("w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, rows[0].keys())
        out.writeheader()
        out.writerows(rows)
    prepare.main([str(tmp_path / "quality.csv"), str(tmp_path)])
    files = {
        p.stem: [json.loads(line) for line in p.read_text(encoding="utf-8").splitlines()]
        for p in tmp_path.glob("*.jsonl")
    }
    lists = {name: {row["prompt"] for row in found} for name, found in files.items()}
    alone = ["sft", "rm", "ppo", "judge_rm", "validation", "test"]
    assert sum(len(lists[name]) for name in alone) == len(set.union(*map(lists.get, alone))) == 300
    assert all(
        abs(len(lists[name]) / 300 - share) < 0.07
        for name, share in zip(alone, prepare.SHARES.values(), strict=True)
    )
    assert lists["judge_sft"] == lists["judge_rm"] and lists["best"] == lists["rm"]
    assert lists["test_rm"] == lists["test"] and lists["validation_rm"] == lists["validation"]

    assert len(files["sft"]) == 10 * len(lists["sft"])
    first = files["rm"][0]
    assert first["scores"] == [80, 90, 70, 60, 40]
    assert all("is pub 1." in row["completion"] for row in files["best"])
    assert len(files["best"]) == len(files["rm"]) == len(lists["rm"])

    some = prepare.splits(prepare.rankings(rows[:300]))
    assert {r["prompt"] for r in some["test"]} <= lists["test"]

    assert load_rankings(Data(path=str(tmp_path / "rm.jsonl")))[0].ranks == [2, 1, 3, 4, 5]
    assert len(load_prompts(Data(path=str(tmp_path / "ppo.jsonl")))) == len(files["ppo"])
    assert load_demonstrations(Data(path=str(tmp_path / "best.jsonl")))


def test_wins_at_equal_length_are_not_those_of_longer_texts():
    lists = [str(i // 2) for i in range(200)]
    tokens = [i % 5 for i in range(200)]  # wins exactly where it is longer, by an unrelated grade
    ours = {
        "rule": [1.0 if t > 2 else 0.0 if t < 2 else 0.5 for t in tokens],
        "tokens": [t + 1.0 for t in tokens],
    }
    theirs = {"rule": [0.5] * 200, "tokens": [3.0] * 200}
    found = versus(ours, theirs, "rule", lists)
    assert found["value"] == 0.5 and found["ties"] == pytest.approx(0.2)
    assert found["at_equal_length"]["value"] == pytest.approx(0.5)
    assert found["close"] == {"pairs": 200, "rate": 0.5}
    longer = versus({**ours, "tokens": [t + 3.0 for t in tokens]}, theirs, "rule", lists)
    assert longer["value"] == 0.5 and longer["at_equal_length"]["value"] < 0.1


def test_an_interval_draws_whole_lists():
    values, lists = [0.0] * 50 + [1.0] * 50, [str(i // 50) for i in range(100)]
    clustered, free = interval(values, lists), interval(values, [str(i) for i in range(100)])
    assert clustered == {"value": 0.5, "low": 0.0, "high": 1.0}
    assert 0.38 < free["low"] < 0.42 and 0.58 < free["high"] < 0.62
    sizes = bootstrap(lambda counts: counts.sum(axis=1), lists, 10)
    assert sizes == {"value": 100, "low": 100, "high": 100}


def test_what_is_judged_beside_ppo_has_the_answers_of_the_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLHF_CHECKPOINTS", str(tmp_path))
    run = small_run.make_run(tmp_path)
    judge = small_run.make_run(tmp_path / "judge", ("base", "sft", "rm"), first_seed=10)
    prompts = [{"prompt": COFFEE}, {"prompt": NAMED}] * 2
    ranked = [{"prompt": COFFEE, "responses": ["w1", "w2 w3", "w4"], "scores": [3, 2, 1]}]
    data = small_run.write_jsonl(tmp_path / "lists.jsonl", prompts)
    small_run.write_jsonl(tmp_path / "data/e2e/test_rm.jsonl", ranked)
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"prompts: {{path: {data}}}\njudge: configs.e2e.rule\nmax_new_tokens: 4\ncandidates: 1\n"
    )
    words = ["--run", str(run), "--judge", str(judge), "--best", str(judge)]
    run_evaluation(run, load_config(EvalConfig, config, []))
    judged.main([*words, "--config", str(config)])

    found = json.loads((run / "judged-test.json").read_text())
    names = ["sft", "ppo", "best of 4", "sft on the best-ranked"]
    assert list(found["policies"]) == names and list(found["over_sft"]) == names[1:]
    assert (found["lists"], found["answers"]) == (2, 4)
    evaluated = json.loads((run / "eval" / "test.json").read_text())
    for name in ("sft", "ppo"):
        ours, theirs = found["policies"][name], evaluated["models"][name]
        assert ours["rule"] == pytest.approx(theirs["judge"])
        assert ours["rm"] == pytest.approx(theirs["rm_score"])
    assert found["policies"]["best of 4"]["rm"] > found["policies"]["sft"]["rm"]
    assert found["over_sft"]["ppo"]["rule"]["value"] == pytest.approx(
        evaluated["comparisons"]["ppo_vs_sft"]["rate"]
    )
    assert found["rankings"]["rule"]["pairs"] == found["rankings"]["held_out_rm"]["pairs"] == 3
    rows = (run / "judged-test_samples.jsonl").read_text().splitlines()
    assert [json.loads(row)["policy"] for row in rows] == [name for name in names for _ in range(4)]
    assert "ppo                      wins over sft: rule" in capsys.readouterr().out
