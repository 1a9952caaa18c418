"""Handing a run over: folders that plain transformers loads, their cards, and what goes to a hub."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config
from transformers import GPT2ForSequenceClassification as GPT2Scorer

import small_run
import tiny_models
from pipeline.commands import export, model_card, push
from pipeline.data.messages import message
from pipeline.data.template import encode_responses
from pipeline.errors import UserError
from pipeline.evaluation.record import load_record
from pipeline.models.forward import fold_bias, score_sequences
from pipeline.models.loading import load_reward, load_tokenizer
from test_summary import judged

BIAS = 0.7


def gpt2_reward(seed: int) -> GPT2Scorer:
    """Its last norm has a bias, as Llama's has not."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 29, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, eos_token_id=4, pad_token_id=0, num_labels=1, reward_bias=BIAS)
    return GPT2Scorer(config).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An evaluated run whose reward model has a bias."""
    with pytest.MonkeyPatch.context() as patch:
        reward = tiny_models.reward
        patch.setattr(tiny_models, "reward", lambda seed: reward(seed, bias=BIAS))
        run = small_run.make_run(tmp_path_factory.mktemp("export"), sft={"model": "owner/base"})
    rate = {"rate": 0.7, "low": 0.6, "high": 0.8, "wins": 8, "ties": 1, "losses": 3}
    rate |= {"difference": 0.5, "difference_low": 0.1, "difference_high": 0.9}
    model = {"n": 12, "judge": 1.0, "ended": 1.0, "length": 8.0}
    judged(
        run, models={"sft": model, "ppo": model}, comparisons={"ppo_vs_sft": rate},
        kl={"ppo_vs_sft": 1.5, "std_error": 0.1},
    )  # fmt: skip
    export.main(["--run", str(run)])
    return run


def own_score(folder: Path, *replies: str) -> list[float]:
    """Centred scores of replies to "w1 w2", as the pipeline itself reads the model."""
    model, tokenizer = load_reward(folder), load_tokenizer(folder)
    prompt, encoded = encode_responses(tokenizer, [message("user", "w1 w2")], list(replies))
    return score_sequences(model, [prompt] * len(encoded), encoded, tokenizer.pad_token_id)


def as_the_card_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> float:
    """What the card's own lines print for the reply w3 to "w1 w2"."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    code = code.replace("THIS FOLDER OR ITS HUB ID", str(folder))
    capsys.readouterr()
    exec(code.replace('"..."', '"w1 w2"', 1).replace('"..."', '"w3"', 1), {})
    return float(capsys.readouterr().out)


def test_a_policy_is_what_the_stage_published_and_takes_no_data_along(run):
    folder = run / "export" / "ppo"
    ids = torch.tensor([[2, 7, 3]])
    ours, theirs = (AutoModelForCausalLM.from_pretrained(p) for p in (run / "ppo", folder))
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny_models.TEMPLATE
    assert not list(folder.rglob("*.jsonl"))
    assert sorted(p.name for p in (folder / "configs").iterdir()) == [
        "ppo.yaml",
        "rm.yaml",
        "sft.yaml",
    ]


def test_its_card_is_one_and_says_where_it_comes_from(run):
    card = ModelCard.load(run / "export" / "ppo" / "README.md")
    assert card.data.base_model == "owner/base" and card.data.license == "unknown"
    [rate] = card.data.eval_results
    assert rate.metric_value == 0.7 and rate.metric_name == "win rate, ppo over sft, by judge"
    for text in (
        "| `data/train.jsonl` | `" + "ab" * 32 + "` | **to be filled in** |",
        "| ppo over sft | judge | 70.0 % | 60.0 to 80.0 | 8 / 1 / 3 |",
        "| KL to SFT, nats per response | – | 1.50 ± 0.10 |",
        "0.750 of 4 held-out untied pairs (95 % interval 0.301 to 0.954)",
        "python -m stages.ppo --config configs/ppo.yaml",
    ):
        assert text in card.content, text
    assert str(run.parent) not in card.content


def test_code_that_a_stage_ran_is_no_data_of_its_card(run):
    record = load_record(run)
    record.stages["rm"].manifest["inputs"] |= {"my/labeler.py": "cd" * 32}
    assert [name for name, *_ in model_card._data(record)] == ["data/train.jsonl"]


def test_the_cards_lines_give_a_llamas_centred_score(run, capsys):
    folder = run / "export" / "rm"
    [score] = own_score(run / "rm", "w3")
    assert as_the_card_says(folder, capsys) == pytest.approx(score, abs=1e-5)
    assert "take off `model.config.reward_bias` (0.7000)" in (folder / "README.md").read_text()


def test_a_gpt2s_own_logits_are_centred(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny_models, "reward", gpt2_reward)
    run = small_run.make_run(tmp_path, ("base", "sft", "rm"))
    before = own_score(run / "rm", "w3", "w4 w5")
    folder = export.export(load_record(run), "rm")
    assert "- model.config" not in (folder / "README.md").read_text()
    assert as_the_card_says(folder, capsys) == pytest.approx(before[0], abs=1e-5)
    assert own_score(folder, "w3", "w4 w5") == pytest.approx(before, abs=1e-5)
    assert before[0] != pytest.approx(before[1], abs=1e-3)


def test_a_bias_that_would_not_reach_the_score_stays_where_it_is():
    """A norm that the head does not follow: its bias is put back."""
    model = gpt2_reward(0)
    model.transformer.ln_f.register_forward_hook(lambda _, __, out: out * 2)
    before = model(torch.tensor([[1, 2, 4]])).logits
    assert not fold_bias(model)
    assert torch.equal(model(torch.tensor([[1, 2, 4]])).logits, before)
    assert model.config.reward_bias == BIAS


def test_an_export_is_made_again_unless_a_person_has_edited_it(run):
    card = run / "export" / "ppo" / "README.md"
    before = card.read_text()
    export.main(["--run", str(run), "--stage", "ppo"])
    assert card.read_text() == before
    card.write_text(before.replace("**to be filled in**", "MIT", 1))
    with pytest.raises(UserError, match="README.md.* changed since it was exported; move it away"):
        export.main(["--run", str(run), "--stage", "ppo"])
    assert "MIT" in card.read_text()
    card.write_text(before)


def test_what_cannot_be_exported_is_told_in_a_line(run, tmp_path):
    with pytest.raises(UserError, match="no moving average was kept"):
        export.main(["--run", str(run), "--ema"])
    with pytest.raises(UserError, match="nothing has been made yet"):
        export.main(["--run", str(tmp_path / "none")])
    other = small_run.make_run(tmp_path, ("base", "sft"))
    with pytest.raises(UserError, match="not made yet; make it: make rm RUN=run"):
        export.main(["--run", str(other), "--stage", "rm"])
    (other / "sft" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json"):
        export.main(["--run", str(other)])
    assert not (other / "export" / "sft").exists()


class Hub:
    """Notes what it is asked for."""

    def __init__(self, error: Exception | None = None):
        self.error, self.calls = error, []

    def __call__(self) -> "Hub":
        return self

    def create_repo(self, repo, **options):
        self.calls.append((repo, options))

    def upload_folder(self, **options):
        if self.error:
            raise self.error
        self.calls.append(options)
        return "https://hub/me/it/commit/1"


def pushed(run: Path, monkeypatch, hub: Hub, *words: str) -> Hub:
    monkeypatch.setattr(push, "HfApi", hub)
    monkeypatch.setattr(ModelCard, "validate", lambda self: None)
    push.main(["--run", str(run), "--repo", "me/it", *words])
    return hub


def test_a_push_sends_nothing_unless_it_is_told_to(run, monkeypatch, capsys):
    assert not pushed(run, monkeypatch, Hub()).calls
    told = capsys.readouterr().out
    assert "model.safetensors" in told and "nothing was sent" in told and "to be filled in" in told


def test_a_push_sends_the_export_to_a_private_repository(run, monkeypatch, capsys):
    (_, options), sent = pushed(run, monkeypatch, Hub(), "--upload", "--stage", "rm").calls
    assert options == {"private": True, "exist_ok": True}
    assert sent["repo_id"] == "me/it" and sent["folder_path"] == run / "export" / "rm"
    assert "README.md" in sent["allow_patterns"] and "manifest.json" not in sent["allow_patterns"]
    assert "https://hub/me/it/commit/1" in capsys.readouterr().out


def test_what_keeps_a_push_from_the_hub_is_told_in_a_line(run, monkeypatch):
    with pytest.raises(UserError, match=r"me/it: not sent: no route \(HF_TOKEN"):
        pushed(run, monkeypatch, Hub(OSError("no route\nto host")), "--upload")
    with pytest.raises(UserError, match="not exported yet: make export RUN=run"):
        pushed(run, monkeypatch, Hub(), "--stage", "sft")
    for name in ("it", "me/it/too", "me/-it-"):
        with pytest.raises(UserError, match="REPO="):
            push.main(["--run", str(run), "--repo", name])
