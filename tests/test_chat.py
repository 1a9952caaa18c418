"""Chat: talk with a policy; or every model of a run answers the same prompt, with its reward."""

import io
import os
import pty
import subprocess
import sys
import time

import pytest
import torch
import transformers
from rich.console import Console

import small_run
from pipeline.commands import chat, side_by_side
from pipeline.config.schema import Data
from pipeline.data.forms import load_demonstrations
from pipeline.data.rankings import load_rankings
from pipeline.data.template import encode_prompt
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
    room = side_by_side.Room(chat.find_stages(run), max_new_tokens=1, greedy=True)
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
    chat.main(["--run", str(run), "--compare"])
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
    assert list(chat.typed()) == ["hello"]


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
    out = shown(side_by_side.table("[red]你好[/red]", [("sft", "[bold]谢谢[/bold]", False, 1.234)]))
    assert "[red]你好[/red]" in out
    assert "[bold]谢谢[/bold] … (cut off)" in out
    assert "1.23" in out


def test_models_answer_where_the_accelerator_is(run, monkeypatch):
    """What `device()` says is what a model is moved to: here another precision, which is seen."""
    monkeypatch.setattr("pipeline.models.device.device", lambda: torch.float64)
    room = side_by_side.Room(chat.find_stages(run), max_new_tokens=1)
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
    chat.main(["--run", str(run), "--compare"])
    out = capsys.readouterr().out
    assert "chat: a prompt of 82 tokens" in out and out.count("ppo") == 2


# --- a conversation -------------------------------------------------------------------------------


@pytest.fixture
def talk(run) -> chat.Talk:
    return chat.Talk(run, chat.find_stages(run), max_new_tokens=8, seed=1)


def said(talk: chat.Talk, text: str) -> str:
    return "".join(talk.ask(text))


def test_an_answer_comes_in_pieces_and_is_that_of_the_same_seed_at_once(talk, run):
    pieces = list(talk.ask("w1 w2"))
    assert len([piece for piece in pieces if piece]) > 2
    room = side_by_side.Room(chat.find_stages(run), 8, seed=1)
    name, text, ended, _ = room.ask("w1 w2")[-1]
    assert name == talk.name == "ppo"
    assert "".join(pieces) == text + ("" if ended else " … (cut off)")


def test_what_was_said_before_is_read_by_the_chat_template(talk, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "pipeline.data.template.encode_prompt",
        lambda tokenizer, messages: asked.append(messages) or encode_prompt(tokenizer, messages),
    )
    talk.command("/system w9")
    said(talk, "w1")
    said(talk, "你好")
    assert [m["role"] for m in asked[1]] == ["system", "user", "assistant", "user"]
    assert asked[1][:3] == talk.messages[:3] and asked[1][3]["content"] == "你好"
    talk.command("/reset")
    said(talk, "w3")
    assert [m["content"] for m in asked[2]] == ["w9", "w3"]


def test_another_model_and_temperature_answer(talk, run):
    talk.command("/temperature 0")
    talk.command("/model sft")
    answer = said(talk, "w1")
    room = side_by_side.Room(chat.find_stages(run), 8, greedy=True)
    assert answer.startswith(dict(row[:2] for row in room.ask("w1"))["sft"])
    assert list(talk.models) == ["ppo", "sft"]  # the other one stays loaded
    talk.command("/temperature 0.5")
    assert (talk.greedy, talk.temperature) == (False, 0.5)


def test_a_saved_conversation_is_a_demonstration_and_no_file_is_overwritten(talk, run, tmp_path):
    said(talk, "你好")
    path = tmp_path / "kept.jsonl"
    assert str(path) in talk.command(f"/save {path}")
    [row] = load_demonstrations(Data(path=str(path)))
    assert row.messages == talk.messages
    with pytest.raises(UserError, match=r"kept.jsonl: File exists"):
        talk.command(f"/save {path}")
    first, second = talk.command("/save"), talk.command("/save")
    assert first.endswith("chats/1.jsonl") and second.endswith("chats/2.jsonl")


def test_judgements_are_kept_as_rankings_the_reward_model_reads(talk, run):
    said(talk, "w1")
    first = talk.messages[-1]["content"]
    talk.command("/retry")  # seeded once, not for every answer
    second = talk.messages[-1]["content"]
    assert first != second and len(talk.messages) == 2
    assert "rated.jsonl" in talk.command("/rate 6")
    assert '"rating": 6' in (run / "rated.jsonl").read_text()
    for line in ("/better", "/worse", "/better 谢谢"):
        assert "ratings.jsonl" in talk.command(line)
    with pytest.raises(UserError, match="/better: these are the answer's own words"):
        talk.command(f"/better {second}")
    with (run / "ratings.jsonl").open("a") as file:
        file.write('{"torn')
    talk.command("/better 谢谢")  # begins on a line of its own
    (run / "ratings.jsonl").write_text((run / "ratings.jsonl").read_text().replace('{"torn\n', ""))
    better, worse, own, _ = load_rankings(Data(path=str(run / "ratings.jsonl")))
    assert (better.responses, better.ranks) == ([second, first], [1, 2])
    assert worse.ranks == [2, 1] and own.responses == ["谢谢", second]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/rate 5", "nothing was answered yet"),
        ("/retry", "nothing was answered yet"),
        ("/nope", "/nope: no such command"),
        ("/model gpt", "one of base, sft, ppo; now it is ppo"),
        ("/temperature hot", "a number from 0"),
        ("/temperature -1", "a number from 0"),
    ],
)
def test_a_command_that_cannot_be_is_told_in_a_line(talk, line, told):
    with pytest.raises(UserError, match=told):
        talk.command(line)


def test_mistakes_do_not_end_the_conversation_and_two_slashes_are_one_that_is_said(
    run, capsys, monkeypatch
):
    lines = "/nope\n" + "w1 " * 80 + "\n//w1\n/rate 9\n/better\n/help\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat.main(["--run", str(run), "--max-new-tokens", "3"])
    out = capsys.readouterr().out
    for told in (
        "no such command",
        "a prompt of 82 tokens",
        "from 1 (bad)",
        "/retry gives",
        "/save",
    ):
        assert told in out


def test_ctrl_c_ends_an_answer_where_it_is_and_what_was_read_stays(talk, capsys):
    def interrupted():
        for number, piece in enumerate(talk.ask("w1")):
            if number == 2:
                raise KeyboardInterrupt
            yield piece

    chat.show(interrupted())
    shown = capsys.readouterr().out.rstrip("\n")
    assert (
        talk.messages[-1]["content"].startswith(shown) and talk.messages[-1]["role"] == "assistant"
    )


@pytest.mark.slow
def test_a_person_on_a_terminal_talks_chinese(run):
    """A whole process behind a pseudo-terminal."""
    person, terminal = pty.openpty()
    words = [sys.executable, "-m", "pipeline.commands.chat", "--run", str(run), "--greedy"]
    process = subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    for line in ("", "你好 w1\n", "/rate 3\n", "\x04"):
        wait = time.monotonic() + 120
        out = b""
        os.write(person, line.encode())
        while not out.endswith(b"> ") and line != "\x04" and time.monotonic() < wait:
            out += os.read(person, 4096)
    assert process.wait(60) == 0
    os.close(person)
    last = (run / "rated.jsonl").read_text().splitlines()[-1]
    assert '"content": "你好 w1"' in last and '"rating": 3' in last
