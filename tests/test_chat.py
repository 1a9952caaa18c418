"""Chat: every model of a run answers the same prompt, with its reward."""

import io

import pytest
import torch
import transformers
from rich.console import Console

import small_run
from pipeline.commands import chat
from pipeline.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run.make_run(tmp_path_factory.mktemp("chat"))


def shown(table) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()


def test_all_models_answer_each_prompt(run, capsys):
    chat.main(["--run", str(run), "--prompt", "w1 w2", "--prompt", "w3", "--seed", "1"])
    out = capsys.readouterr().out
    assert [out.count(name) for name in ("base", "sft", "ppo")] == [2, 2, 2]
    chat.main(["--run", str(run), "--prompt", "w1 w2", "--prompt", "w3", "--seed", "1"])
    assert capsys.readouterr().out == out


def test_no_bar_of_transformers_is_shown(run, capfd):
    transformers.utils.logging.enable_progress_bar()
    capfd.readouterr()
    chat.main(["--run", str(run), "--prompt", "w1 w2"])
    assert capfd.readouterr().err == ""


def test_greedy_answer_is_the_likeliest_and_scored_by_the_reward_model(run):
    room = chat.Room(chat.find_stages(run), max_new_tokens=1, greedy=True)
    ids = room.tokenizer("<user> w1 <bot>", add_special_tokens=False)["input_ids"]
    best = room.models["sft"](torch.tensor([ids])).logits[0, -1].argmax().item()
    name, text, _, score = room.ask("w1")[1]
    assert (name, text) == ("sft", room.tokenizer.decode([best], skip_special_tokens=True))
    closed = [*ids, best, room.tokenizer.eos_token_id]  # cut off, and read with the end it lacks
    hidden = room.reward.model(torch.tensor([closed])).last_hidden_state[0, -1]
    expected = room.reward.score(hidden).item()
    assert score == pytest.approx(expected, abs=1e-4)


def test_lines_of_standard_input_are_prompts(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w1\n\n  w2 w3\n"))
    chat.main(["--run", str(run)])
    out = capsys.readouterr().out
    assert "w2 w3" in out
    assert out.count("ppo") == 2


def test_ctrl_d_ends_an_interactive_chat(monkeypatch):
    answers = iter(["", "hello", EOFError()])

    def typed(_):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("builtins.input", typed)
    assert list(chat.prompts(Console(file=io.StringIO()))) == ["hello"]


def test_sft_alone_answers_without_a_reward(tmp_path, capsys):
    run = small_run.make_run(tmp_path, ("base", "sft"))
    chat.main(["--run", str(run), "--prompt", "w1", "--max-new-tokens", "3"])
    out = capsys.readouterr().out
    assert "sft" in out
    assert "ppo" not in out


def test_nobody_to_talk_with(tmp_path):
    with pytest.raises(UserError, match="make sft RUN=empty"):
        chat.main(["--run", str(tmp_path / "empty"), "--prompt", "w1"])


def test_markup_and_chinese_are_shown_as_they_are():
    out = shown(chat.table("[red]你好[/red]", [("sft", "[bold]谢谢[/bold]", False, 1.234)]))
    assert "[red]你好[/red]" in out
    assert "[bold]谢谢[/bold] … (cut off)" in out
    assert "1.23" in out


def test_models_answer_where_the_accelerator_is(run, monkeypatch):
    """What `device()` says is what a model is moved to: here another precision, which is seen."""
    monkeypatch.setattr("pipeline.models.device.device", lambda: torch.float64)
    room = chat.Room(chat.find_stages(run), max_new_tokens=1)
    assert {model.dtype for model in [*room.models.values(), room.reward]} == {torch.float64}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--max-new-tokens", "0"], "at least 1"),
        (["--max-new-tokens", "-3"], "at least 1"),
        (["--temperature", "nan"], "above 0"),
        (["--temperature", "inf"], "above 0"),
        ([], "a prompt of 82 tokens, a model for 64"),
    ],
)
def test_what_no_model_can_do_is_told(run, words, told):
    with pytest.raises(UserError, match=told):
        chat.main(["--run", str(run), "--prompt", "w1 " * 80, *words])


def test_a_temperature_of_the_likeliest_answer_is_refused(capsys):
    with pytest.raises(SystemExit):
        chat.parser().parse_args(["--run", "x", "--greedy", "--temperature", "2"])
    assert "not allowed with argument --greedy" in capsys.readouterr().err


def test_a_line_that_is_too_long_or_no_text_does_not_end_the_others(run, capsys, monkeypatch):
    lines = b"w1 " * 80 + b"\n\xff\xfe\nw2\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    chat.main(["--run", str(run)])
    out = capsys.readouterr().out
    assert "chat: a prompt of 82 tokens" in out and out.count("ppo") == 2
