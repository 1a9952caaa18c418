"""Several sources, each with a weight."""

import json
from collections import Counter

import pytest

import tiny_models
from pipeline.config.load import load_config
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import Data, SFTConfig, Source
from pipeline.data.forms import load_demonstrations, load_prompts, load_texts
from pipeline.data.rankings import load_rankings
from pipeline.data.splits import split_by_prompt
from pipeline.errors import UserError
from pipeline.handoff import artifacts
from pipeline.handoff.lineage import inputs_of, missing
from pipeline.process.files import sha256
from stages import sft


@pytest.fixture
def files(tmp_path):
    """a.jsonl of 40 rows and b.csv of 10, whose prompt has another name."""
    rows = [{"prompt": f"a{n}", "completion": "w1"} for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = "question,completion\n" + "".join(f"b{n},w2\n" for n in range(10))
    (tmp_path / "b.csv").write_text(table)
    return str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")


def mixed(files, a=1.0, b=1.0):
    first, second = files
    columns = {"prompt": "question"}
    return Data(path=[Source(path=first, weight=a), Source(path=second, weight=b, columns=columns)])


def asked(items):
    return [item.messages[0]["content"] for item in items]


@pytest.mark.parametrize("weights", [(0.01, 1), (1, 0.04)])
def test_a_source_whose_weight_gives_no_row_is_an_error(files, weights):
    name, size = (files[0], 40) if weights[0] < 1 else (files[1], 10)
    for load in (load_demonstrations, load_prompts, load_texts):
        with pytest.raises(UserError, match=f"{name}: weight .* of {size} rows is less than one"):
            load(mixed(files, *weights))
        with pytest.raises(UserError, match="a.jsonl: weight 0.001 of 40 rows"):
            load(Data(path=[Source(path=files[0], weight=0.001)]))


@pytest.mark.parametrize(("a", "b"), [(1, 1), (0.5, 1), (0.25, 4), (2.5, 1.3)])
def test_each_source_has_the_share_that_its_weight_gives(files, a, b):
    for load in (load_demonstrations, load_prompts):
        items = load(mixed(files, a, b), seed=3)
        assert Counter(item.source for item in items) == {files[0]: 40 * a, files[1]: 10 * b}
        times = Counter(asked(items))
        assert len(set(times.values())) <= 2 + (a != b)  # no row is drawn twice before all are once
        assert max(times[f"a{n}"] for n in range(40)) - min(times[f"a{n}"] for n in range(40)) <= 1
    assert len(load_texts(mixed(files, a, b))) == 40 * a + 10 * b


def test_the_draw_is_the_seed_s(files):
    once, again, other = (asked(load_prompts(mixed(files, 0.5), seed=s)) for s in (1, 1, 2))
    assert once == again != other
    assert once == sorted(once, key=lambda name: (name[0], int(name[1:])))


def test_what_is_there_twice_is_held_out_once_and_on_one_side(files):
    items = load_demonstrations(mixed(files, 2, 3))
    training, held_out = split_by_prompt(items, 0.2, seed=1)
    assert not set(asked(training)) & set(asked(held_out))
    assert len(set(asked(held_out))) == len(held_out) == 10


def test_keys_beside_the_list_hold_where_a_source_has_none_of_its_own(files):
    first, second = files
    data = Data(path=[first, Source(path=second, columns={"prompt": "question"}, limit=4)], limit=3)
    assert Counter(item.source for item in load_prompts(data)) == {first: 3, second: 4}
    ranked = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 2
    with open(first, "w") as file:
        file.write("".join(json.dumps(row) + "\n" for row in ranked))
    data = Data(path=[Source(path=first, weight=2)], votes="majority")
    assert len(load_rankings(data)) == 2


def test_a_problem_names_its_own_file_and_a_missing_one_its_key(files, tmp_path):
    first, second = files
    data = Data(path=[first, Source(path=second, weight=2)])
    with pytest.raises(UserError, match=r"b\.csv:2: no prompt"):
        load_demonstrations(data)
    config = SFTConfig(model="m/m", data=data)
    assert inputs_of(config).keys() >= {first, second}
    assert inputs_of(config, "abc") == {"dataset": "abc", "m/m": "m/m"}
    gone = PPOConfig(prompts=Data(path=[Source(path=str(tmp_path / "gone.jsonl"))]))
    assert missing(gone)[0].startswith("prompts.path.0.path: ")


def test_yaml_spells_it_plainly_and_faults_are_told_by_key(files, tmp_path):
    first, second = files
    path = tmp_path / "sft.yaml"
    path.write_text(f"model: m/m\ndata:\n  path: [{first}, {{path: {second}, weight: 2}}]\n")
    config = load_config(SFTConfig, path)
    assert config.data.path == [first, Source(path=second, weight=2.0)]
    for entry, told in [
        ("{path: b.csv, weight: 0}", "weight: input should be greater than 0"),
        ("{path: b.csv, wieght: 2}", "wieght: unknown key"),
        ("{weight: 2}", "path: missing"),
    ]:
        path.write_text(f"model: m/m\ndata: {{path: [{entry}]}}\n")
        with pytest.raises(UserError, match=told):
            load_config(SFTConfig, path)


def test_a_stage_counts_each_source_and_weight_one_changes_nothing(files, tmp_path):
    tiny_models.policy(0).save_pretrained(tmp_path / "base")
    tiny_models.tokenizer().save_pretrained(tmp_path / "base")
    hashes = {}
    for name, data in {
        "plain": Data(path=files[0]),
        "one": Data(path=[Source(path=files[0])]),
        "two": mixed(files, 0.5, 2),
    }.items():
        config = SFTConfig(
            model=str(tmp_path / "base"), run=tmp_path / name, data=data, batch_size=8,
            validation_fraction=0, wandb={"mode": "disabled"},
        )  # fmt: skip
        folder = sft.run(config)
        hashes[name] = sha256(folder / "model.safetensors")
    assert hashes["plain"] == hashes["one"] != hashes["two"]
    metrics = artifacts.read_manifest(folder).metrics
    assert (metrics[f"from {files[0]}"], metrics[f"from {files[1]}"]) == (20, 20)
    assert metrics["steps"] == 5
