"""`python -m pipeline.evaluation` on a run of random tiny models."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import transformers

import small_run
import tiny_models
from pipeline.config.evaluation import EvalConfig
from pipeline.config.schema import Data
from pipeline.errors import UserError
from pipeline.evaluation import likelihoods, report
from pipeline.evaluation.__main__ import main, run_evaluation
from pipeline.evaluation.evaluate import labels, references
from pipeline.evaluation.judges import load_judge
from pipeline.evaluation.likelihoods import sequence_logprobs
from pipeline.evaluation.rankings import Scored
from pipeline.evaluation.record import load_record
from pipeline.handoff.artifacts import Manifest, publish


def config(root, **changes) -> EvalConfig:
    keys = {
        "prompts": Data(path=str(root / "prompts.jsonl")),
        "judge": "small_judge",
        "group_by": "family",
        "max_new_tokens": 6,
        "candidates": 4,
        "candidate_prompts": 6,
        "threads": 1,
    }
    return EvalConfig(**{**keys, **changes})


@pytest.fixture
def judge(monkeypatch):
    return small_run.install(monkeypatch, small_run.judge_module())


def test_a_whole_run_is_measured_and_a_second_time_nothing_is_done(tmp_path, judge):
    run = small_run.make_run(tmp_path)
    result = run_evaluation(run, config(tmp_path))
    assert list(result["models"]) == ["base", "sft", "ppo"]
    assert {"judge", "rm_score", "length", "ended"} <= result["models"]["ppo"].keys()
    assert "exact" not in result["models"]["ppo"]
    odd_even = result["models"]["sft"]["groups"]["family"]
    mean = (6 * odd_even["odd"]["judge"] + 6 * odd_even["even"]["judge"]) / 12
    assert mean == pytest.approx(result["models"]["sft"]["judge"])
    assert set(result["comparisons"]) >= {"sft_vs_base", "ppo_vs_sft", "ppo_vs_sft_by_rm"}
    assert [row["n"] for row in result["rm"]["best_of_n"]] == [1, 2, 4]
    assert result["kl"]["ppo_vs_sft"] > 0.1  # other random weights altogether
    rows = [json.loads(s) for s in (run / "eval/test_samples.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert set(rows[0]["answers"]) == {"base", "sft", "ppo"}

    stamp = (run / "eval/test.json").stat().st_mtime_ns
    assert run_evaluation(run, config(tmp_path)) == result
    assert (run / "eval/test.json").stat().st_mtime_ns == stamp
    again = run_evaluation(run, config(tmp_path), force=True)
    assert again["models"] == result["models"]  # same seed, same numbers


def test_threads_are_heeded_and_no_bar_of_transformers_is_shown(tmp_path, judge, capfd):
    run = small_run.make_run(tmp_path, ("base", "sft"))
    transformers.utils.logging.enable_progress_bar()
    capfd.readouterr()
    threads = torch.get_num_threads()
    try:
        run_evaluation(run, config(tmp_path, threads=threads + 1))
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert "it/s" not in capfd.readouterr().err


def test_sft_alone_without_a_judge(tmp_path):
    run = small_run.make_run(tmp_path, ("base", "sft"))
    demonstrations = [{"prompt": "w1 w2", "completion": "w3"}]
    small_run.write_jsonl(tmp_path / "demonstrations.jsonl", demonstrations)
    result = run_evaluation(
        run,
        config(
            tmp_path,
            judge=None,
            reference="answer",
            demonstrations=Data(path=str(tmp_path / "demonstrations.jsonl")),
        ),
    )
    assert set(result["models"]) == {"base", "sft"}
    assert result["comparisons"] == {}
    assert "rm" not in result
    assert "kl" not in result
    sft = result["models"]["sft"]
    assert "judge" not in sft
    assert all(0 <= sft[f"token_{name}"] <= 1 for name in ("precision", "recall", "f1"))
    assert sft["perplexity"] > 1


def test_perplexity_of_pretraining_text_is_that_of_every_token_but_the_first(tmp_path):
    run = small_run.make_run(tmp_path, ("base", "sft", "ppo"))
    texts = ["w1 w2 w3", "w4 w5 <end> w7 w8 w9", "w1", "w2 w3"]  # the last is beyond the limit
    small_run.write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    changes = {"pretraining_limit": 3, "pretraining_max_length": 4, "judge": None}
    data = Data(path=str(tmp_path / "texts.jsonl"))
    result = run_evaluation(run, config(tmp_path, pretraining=data, **changes))
    tokenizer = tiny_models.tokenizer()
    rows = [tokenizer.encode(text) for text in ("w1 w2 w3 <end>", "w4 w5 <unk> w7", "w1 <end>")]
    for name, seed in (("base", 0), ("sft", 1), ("ppo", 2)):
        model, total = tiny_models.policy(seed), 0.0
        for ids in rows:
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total += sum(logp[t, ids[t + 1]].item() for t in range(len(ids) - 1))
        found = result["models"][name]["text_perplexity"]
        assert found == pytest.approx(math.exp(-total / 7), rel=1e-4)
    assert str(tmp_path / "texts.jsonl") in result["inputs"]
    rows_of_report = dict(report.summary_rows(load_record(run)))
    assert len(rows_of_report["Perplexity of pretraining text"]) == 3


def test_nothing_to_evaluate_names_the_command(tmp_path):
    with pytest.raises(UserError, match="make sft RUN=run"):
        run_evaluation(tmp_path / "run", config(tmp_path))


def test_a_stage_of_another_parent_is_left_out(tmp_path, judge, capsys):
    run = small_run.make_run(tmp_path)
    other = small_run.make_run(tmp_path / "other", ("base", "sft"), first_seed=10)
    manifest = run / "sft" / "manifest.json"
    (run / "sft").rename(tmp_path / "old")
    (other / "sft").rename(run / "sft")
    assert manifest.exists()
    base = json.loads(manifest.read_text())["parents"]["base"]["path"]
    assert "other" in base
    result = run_evaluation(run, config(tmp_path))
    assert set(result["models"]) == {"base", "sft"}
    assert "ppo was made from another sft" in capsys.readouterr().out


def test_a_base_model_that_was_removed_since_is_left_out_and_no_other(tmp_path, judge, capsys):
    run = small_run.make_run(tmp_path)
    shutil.rmtree(tmp_path / "base")
    assert list(run_evaluation(run, config(tmp_path))["models"]) == ["sft", "ppo"]
    assert "eval: the base model is left out" in capsys.readouterr().out
    assert list(report.family_tables(load_record(run)))


def test_an_artifact_that_changed_is_refused(tmp_path, judge):
    run = small_run.make_run(tmp_path)
    weights = run / "ppo" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        run_evaluation(run, config(tmp_path))


def test_sequence_logprobs_are_those_of_an_unpadded_forward_pass():
    model = tiny_models.policy()
    prompts, responses = [[2, 6, 3], [2, 6, 7, 8, 3]], [[9, 10, 4], [11]]
    together = sequence_logprobs(model, prompts, responses, pad=0, temperature=0.5)
    for prompt, response, found in zip(prompts, responses, together, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 0.5
        expected = logits.log_softmax(-1)[range(len(response)), response].sum().item()
        assert found == pytest.approx(expected, abs=1e-4)
        assert math.isfinite(found)


def test_what_does_not_fit_the_models_context_is_left_out(tmp_path, capsys):
    """The tiny models have 64 positions."""
    run = small_run.make_run(tmp_path, ("base", "sft"))
    data = {}
    for name, column in (("prompts", "prompt"), ("demonstrations", "prompt"), ("texts", "text")):
        rows = [{column: text, "completion": "w3"} for text in ("w1 " * 80, "w1 w2", "w1 " * 55)]
        data[name] = Data(path=str(small_run.write_jsonl(tmp_path / f"{name}.jsonl", rows)))
    keys = {"judge": None, "group_by": [], "prompts": data["prompts"]}
    texts = {"demonstrations": data["demonstrations"], "pretraining": data["texts"]}
    result = run_evaluation(run, config(tmp_path, **keys, **texts))
    assert result["prompts"] == 1 + 1
    assert "1 of 3 prompts are left out" in capsys.readouterr().out
    assert all(math.isfinite(model["perplexity"]) for model in result["models"].values())
    with pytest.raises(UserError, match="no prompt fits among the models' places"):
        run_evaluation(run, config(tmp_path, **keys, max_new_tokens=64))


def test_an_encoder_decoder_has_places_for_a_prompt_and_as_many_for_its_response():
    bart = tiny_models.seq2seq("bart")
    assert likelihoods.room({"sft": bart}, 41) == 62
    assert likelihoods.room({"sft": bart, "ppo": tiny_models.policy()}, 41) == 23
    assert likelihoods.room({"sft": bart}, 65) == 0


def test_scores_that_are_no_numbers_end_it_with_words(tmp_path, judge):
    run = small_run.make_run(tmp_path, ("base", "sft"))
    model = tiny_models.reward()
    model.score.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    tiny_models.tokenizer().save_pretrained(tmp_path / "broken")
    publish(tmp_path / "broken", run / "rm", Manifest(stage="rm"))
    with pytest.raises(UserError, match="the reward model gives nan"):
        run_evaluation(run, config(tmp_path))


def test_a_policy_whose_weights_are_no_numbers_is_named(tmp_path, judge):
    run = small_run.make_run(tmp_path, ("base", "sft", "rm"))
    model = tiny_models.policy()
    model.lm_head.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tiny_models.tokenizer().save_pretrained(tmp_path / "broken")
    publish(tmp_path / "broken", run / "ppo", Manifest(stage="ppo"))
    with pytest.raises(UserError, match="run/ppo: this model's logits are no numbers"):
        run_evaluation(run, config(tmp_path))


def test_a_damaged_result_is_named(tmp_path):
    run = small_run.make_run(tmp_path, ("base", "sft"))
    (run / "eval").mkdir()
    (run / "eval" / "test.json").write_text("{")
    with pytest.raises(UserError, match=r"test\.json: damaged .*remove it"):
        load_record(run)


def test_a_key_to_group_by_that_no_prompt_has_is_told(tmp_path, judge):
    run = small_run.make_run(tmp_path, ("base", "sft"))
    with pytest.raises(UserError, match="group_by: no prompt of the split test has a 'famly'"):
        run_evaluation(run, config(tmp_path, group_by=["family", "famly"]))


def test_references_must_be_there():
    rows = [{"a": "x"}, {"a": "<think>hm</think>\n\ny"}]
    assert references(rows, "a") == ["x", "y"]  # as responses are read
    with pytest.raises(UserError, match="prompt 2 has no text under the key 'a'"):
        references([{"a": "x"}, {"b": "y"}], "a")


def test_the_command_line_reads_a_config_and_refuses_keys_it_does_not_know(tmp_path, capsys):
    run = small_run.make_run(tmp_path, ("sft",))
    path = tmp_path / "eval.yaml"
    path.write_text(f"prompts: {{path: {tmp_path}/prompts.jsonl}}\nmax_new_tokens: 4\n")
    words = ["--run", str(run), "--config", str(path)]
    main([*words, "--set", "eval.n=5 seed=9", "seed=2"])  # SET's seed is that of the stages
    result = json.loads((run / "eval" / "test.json").read_text())
    assert (result["prompts"], result["seed"], list(result["models"])) == (5, 2, ["sft"])
    with pytest.raises(UserError, match="did you mean `temperature`"):
        main([*words, "temprature=1"])
    with pytest.raises(UserError, match="set validation_prompts"):
        main([*words, "--split", "validation"])


def test_labels_are_measured_beside_their_ceiling_and_the_length_baseline(monkeypatch):
    """Two prompts, four untied pairs: the model has 2 right, the judge 3, length 2 and a half."""
    name = small_run.install(monkeypatch, small_run.judge_module())
    items = [
        Scored(
            "p", ["w1 w1", "w1", "w2"], [1, 2, 3], lengths=[3, 2, 2], scores=[0.0, 2.0, 1.0], row={}
        ),
        Scored("q", ["w2", "w1"], [1, 2], lengths=[1, 3], scores=[1.0, 0.0], row={}),
    ]
    found = labels(items, load_judge(name))
    assert found["pairs"] == 4
    assert found["accuracy"] == 2 / 4 and found["ceiling"] == 3 / 4
    assert found["length_baseline"] == 2.5 / 4
    assert "ceiling" not in labels(items, None)


def test_a_judge_of_labels_is_told_which_sampled_responses_were_cut_off(monkeypatch):
    """As the labeler was: this one prefers an answer that ended."""
    judge = load_judge(small_run.install(monkeypatch, small_run.judge_module()))
    row = {"responses": ["w2", "w2 w2"], "ended": [True, False]}
    item = Scored("p", ["w2", "w2 w2"], [1, 2], lengths=[2, 2], scores=[1.0, 0.0], row=row)
    assert labels([item], judge)["ceiling"] == 1.0
    assert labels([replace(item, row={})], judge)["ceiling"] == 0.5


def test_a_judge_that_reads_a_column_gets_the_rankings_rows_or_is_left_out(monkeypatch, capsys):
    def score(prompts, responses, rows, ended=None):
        return [float(r == row["answer"]) for r, row in zip(responses, rows, strict=True)]

    judge = load_judge(small_run.install(monkeypatch, small_run.judge_module(score=score)))
    thought = "<think>\nw2\n</think>\n\nw1"
    item = Scored(
        "p", [thought, "w2"], [1, 2], lengths=[2, 2], scores=[1.0, 0.0], row={"answer": "w1"}
    )
    assert labels([item], judge)["ceiling"] == 1.0
    for row, why in ((None, "published without their rows"), ({}, "KeyError: 'answer'")):
        found = labels([item, replace(item, row=row)], judge)
        assert found["accuracy"] == 1.0 and "ceiling" not in found
        assert why in capsys.readouterr().out
