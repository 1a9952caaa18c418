"""Samples worth looking at, and what PPO did to every token."""

import small_run
import tiny_models
from pipeline.evaluation import examples, record, report
from pipeline.ppo.watch import pieces
from test_summary import judged


def sample(prompt: str, sft: tuple[float, float], ppo: tuple[float, float]) -> dict:
    answers = {
        name: {"response": f"{name} {prompt}", "judge": judge, "rm_score": score, "ended": True}
        for name, (judge, score) in (("sft", sft), ("ppo", ppo))
    }
    return {"prompt": prompt, "groups": {}, "answers": answers}


ROWS = [
    sample("good", (1.0, 0.0), (3.0, 1.0)),
    sample("fooled", (3.0, 0.0), (2.0, 2.0)),
    sample("much fooled", (3.0, 0.0), (-1.0, 1.5)),
    sample("honest", (3.0, 1.0), (0.0, -1.0)),
]


def test_errors_come_first_and_the_widest_of_them_before_the_others(tmp_path):
    run = small_run.make_run(tmp_path)
    judged(run, models={"sft": {"judge": 1.0}, "ppo": {"judge": 1.0}}, config={"samples": 1})
    small_run.write_jsonl(run / "eval" / "test_samples.jsonl", ROWS)
    lists = examples.sample_lists(record.load_record(run))
    found = [[row["prompt"] for row in rows] for rows in lists.values()]
    assert next(iter(lists)).startswith("Errors") and found[0] == ["much fooled", "fooled"]
    assert found[1:3] == [
        ["much fooled", "honest", "fooled", "good"],
        ["honest", "good", "much fooled", "fooled"],
    ]
    assert found[-1] == ["good"]


def episode(step: int, **numbers: list[float]) -> dict:
    words = ["<b>", " 好"]
    return {"step": step, "prompt": "p", "score": 1.5, "ended": False, "tokens": words, **numbers}


def test_a_tokens_numbers_stand_behind_it_and_colour_it():
    rows = [episode(1, reward=[9.0, 9.0], kl=[9.0, 9.0])]
    rows += [episode(5, advantage=[-2.0, 1.0], reward=[-0.1, 1.5], kl=[0.2, 0.0])] * 2
    view = examples.token_view(rows)
    assert view["iteration"] == 5 and len(view["episodes"]) == 2
    first, second = view["episodes"][0]["tokens"]
    assert list(view["measures"]) == ["advantage", "reward", "kl"]  # no value network here
    assert first["numbers"] == {"advantage": -2.0, "reward": -0.1, "kl": 0.2}
    assert "--advantage: rgba(218, 54, 51, 0.45)" in first["style"]
    assert "--kl: rgba(47, 111, 235, 0.45)" in first["style"]
    assert "--advantage: rgba(46, 160, 67, 0.2" in second["style"]
    assert "--kl: rgba(47, 111, 235, 0.00)" in second["style"]


def test_the_page_shows_tokens_escaped(tmp_path):
    run = small_run.make_run(tmp_path)
    rows = [episode(5, advantage=[-2.0, 1.0], reward=[-0.1, 1.5], kl=[0.2, 0.0], value=[1.0, 1.0])]
    found = record.load_record(run)
    found.tokens = rows
    page = report.render(found)
    assert (
        'title="advantage -2.000\nreward -0.100\nKL to SFT, nats 0.200\nvalue 1.000">&lt;b&gt;<'
        in page
    )
    assert "<b>b</b>" not in page and page.count('class="token"') == 2


def test_pieces_are_the_text_and_a_character_stands_with_its_last_token():
    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", "replace")

    ids = list("a好b".encode()) + [0xE5]  # cut off within a character
    assert pieces(Bytes(), ids) == ["a", "", "", "好", "b", "\ufffd"]
    tokenizer = tiny_models.tokenizer()
    ids = tokenizer("w1 w2 <end>")["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
