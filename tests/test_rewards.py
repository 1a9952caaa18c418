"""Rewards: functions, services, ensembles, models with another tokenizer, sums, and their config."""

import asyncio
import contextlib
import http.server
import json
import socket
import sys
import threading
import types
from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError

import tiny_models
from pipeline.config.rewards import Reward
from pipeline.data.template import encode_responses
from pipeline.errors import UserError
from pipeline.models.forward import score_sequences
from pipeline.ppo import build, maths, rewards
from pipeline.ppo.rewards import Episodes, RunningScale
from pipeline.ppo.rollout import Query
from test_ppo_exact import QUERIES, RESPONSES, make, recorded

EPISODES = Episodes(
    queries=[[2, 7, 3], [2, 8, 9, 3]],
    response_ids=[[10, 4], [11, 12, 4]],
    prompts=["w2", "w3 w4"],
    responses=["w5", "w6 w7"],
    rows=[{"answer": "w5"}, {"answer": "w8"}],
    messages=[[{"role": "user", "content": p}] for p in ("w2", "w3 w4")],
    tokens=[["w5", "<end>"], ["w6", "w7", "<end>"]],
)


def fixed(*scores: float) -> rewards.Score:
    """A reward that knows nothing."""
    return lambda episodes: list(scores)


@pytest.fixture
def own(monkeypatch):
    """Gives a function a name that a config can hold."""

    def name(function) -> str:
        module = types.ModuleType("own_rewards")
        module.reward = function
        monkeypatch.setitem(sys.modules, "own_rewards", module)
        return "own_rewards:reward"

    return name


# --- functions ------------------------------------------------------------------------------------


def right(prompts, responses, rows):
    return [float(r == row["answer"]) for r, row in zip(responses, rows, strict=True)]


async def right_later(prompts, responses, rows):
    await asyncio.sleep(0)
    return right(prompts, responses, rows)


@pytest.mark.parametrize("function", [right, right_later])
@pytest.mark.parametrize("timeout", [None, 30.0])
def test_a_function_plain_or_async_sees_prompts_responses_and_rows(own, function, timeout):
    assert rewards.function_reward(own(function), timeout)(EPISODES) == [1.0, 0.0]


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_function_that_takes_too_long_is_named_and_keeps_no_process_alive(own, kind):
    stop = threading.Event()

    def never(*_):
        stop.wait(30)

    async def never_async(*_):
        while not stop.is_set():
            await asyncio.sleep(0.01)

    score = rewards.function_reward(own(never if kind == "plain" else never_async), 0.05)
    before = set(threading.enumerate())
    with pytest.raises(
        UserError, match=r"own_rewards:reward took longer than its timeout of 0\.05"
    ):
        score(EPISODES)
    working = set(threading.enumerate()) - before
    assert working  # it cannot be stopped, so Python must not wait for it
    assert all(thread.daemon for thread in working)
    stop.set()


def test_a_functions_own_timeout_error_is_its_own(own):
    def fails(*_):
        raise TimeoutError("the database")

    with pytest.raises(TimeoutError, match="the database"):
        rewards.function_reward(own(fails), 30.0)(EPISODES)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ([1.0], "1 numbers where 2 were needed"),
        ([1.0, 2.0, 3.0], "3 numbers where 2 were needed"),
        ([1.0, None], "not a list of numbers"),
        ([1.0, "good"], "not a list of numbers"),
        (3.0, "not a list of numbers"),
        (None, "not a list of numbers"),
    ],
)
def test_answers_that_are_not_one_number_per_response_are_refused(own, answer, told):
    with pytest.raises(UserError, match=f"own_rewards:reward: {told}"):
        rewards.function_reward(own(lambda *_: answer))(EPISODES)


@pytest.mark.parametrize("name", ["no_such_module:f", "math:no_such", "math", ":f", "math:"])
def test_a_function_that_is_not_there_is_told_at_once(name):
    with pytest.raises(UserError, match="write it as package.module:function"):
        rewards.function_reward(name)


# --- rewards per token ----------------------------------------------------------------------------


def lengths(prompts, responses, rows, tokens):
    return [[float(len(token)) for token in row] for row in tokens]


def test_a_token_function_answers_a_list_as_long_as_the_tokens(own):
    assert rewards.token_function(own(lengths))(EPISODES) == [[2.0, 5.0], [2.0, 2.0, 5.0]]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ([[1.0, 2.0]], "1 lists for 2 responses"),
        ([[1.0, 2.0], [1.0]], "sample 1: 1 numbers where 3 were needed"),
        ([[1.0, "x"], [1.0] * 3], "sample 0: not a list of numbers"),
        ([1.0, 2.0], "sample 0: not a list of numbers"),
    ],
)
def test_token_answers_of_another_shape_are_refused(own, answer, told):
    with pytest.raises(UserError, match=f"own_rewards:reward.*{told}"):
        rewards.token_function(own(lambda *_: answer))(EPISODES)


def test_token_terms_are_summed_with_their_weights(own):
    term = rewards.token_function(own(lengths))
    ones = lambda episodes: [[1.0] * len(row) for row in episodes.tokens]  # noqa: E731
    total = rewards.token_sum([(0.5, term), (-2.0, ones)])
    assert total(EPISODES) == [[-1.0, 0.5], [-1.0, -1.0, 0.5]]
    assert rewards.token_sum([]) is None


def test_ppo_asks_for_token_rewards_of_the_real_tokens_alone(own):
    seen = []

    def place(prompts, responses, rows, tokens):
        seen.extend(tokens)
        return [[float(i + 1) for i in range(len(row))] for row in tokens]

    ppo = make()
    ppo.token_score = rewards.token_function(own(place))
    width = recorded(ppo, extra_right=2).responses.shape[1]
    episodes = ppo.episodes([Query(ids, text="p") for ids in QUERIES], RESPONSES)
    found = ppo._token_scores(episodes, width)
    assert [len(row) for row in seen] == [len(row) for row in RESPONSES]
    expected = [[i + 1.0 if i < len(r) else 0.0 for i in range(width)] for r in RESPONSES]
    assert found.tolist() == expected


def test_ppo_adds_token_rewards_at_their_tokens_and_nowhere_else(monkeypatch):
    given = []
    gae = maths.gae
    monkeypatch.setattr(
        maths, "gae", lambda rewards, *rest: given.append(rewards) or gae(rewards, *rest)
    )
    dense = torch.zeros(4, 5)
    dense[0, 1], dense[2, 4], dense[3, 0] = 0.5, -2.0, 3.0
    logged = []
    for token_scores in (None, dense):
        ppo = make()
        rollout = recorded(ppo)
        rollout.token_scores = token_scores
        logged.append(ppo.update(rollout)["objective/scores"])
    torch.testing.assert_close(given[1] - given[0], dense.double(), rtol=0, atol=1e-12)
    assert logged[1] - logged[0] == pytest.approx(1.5 / 4)


# --- services -------------------------------------------------------------------------------------


@contextlib.contextmanager
def service(*answers: bytes | int | None) -> Iterator[tuple[str, list[dict]]]:
    """A server that gives these answers in turn (an int is a status, None hangs up).

    Yields its address and the bodies it was sent.
    """
    bodies: list[dict] = []
    waiting = list(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            size = int(self.headers["Content-Length"])
            bodies.append(json.loads(self.rfile.read(size)))
            answer = waiting.pop(0)
            if isinstance(answer, bytes) and answer.startswith(b"RAW"):
                self.wfile.write(answer)
            elif isinstance(answer, int):
                self.send_error(answer)
            elif answer is not None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses that were asked for, none of them taken."""
    asked: list[float] = []
    monkeypatch.setattr(rewards.time, "sleep", asked.append)
    return asked


GOOD = b'{"scores": [0.5, -1]}'


def test_a_service_is_sent_prompts_responses_and_rows(pauses):
    with service(GOOD) as (url, bodies):
        assert rewards.remote_reward(url, 10.0, 2)(EPISODES) == [0.5, -1.0]
    sent = {"prompts": EPISODES.prompts, "responses": EPISODES.responses, "rows": EPISODES.rows}
    assert bodies == [sent]
    assert pauses == []


@pytest.mark.parametrize(
    "failure", [503, None, b"RAW nonsense\r\n", b"not json", b"[1, 2]", b'{"score": [1, 2]}']
)
def test_a_service_that_fails_twice_is_asked_a_third_time(pauses, failure):
    with service(failure, failure, GOOD) as (url, bodies):
        assert rewards.remote_reward(url, 10.0, 2)(EPISODES) == [0.5, -1.0]
    assert len(bodies) == 3
    assert bodies[0] == bodies[2]
    assert pauses == [1, 2]


def test_a_service_that_goes_on_failing_ends_the_run_with_its_name(pauses):
    with service(500, 500) as (url, bodies):
        with pytest.raises(UserError, match=rf"{url} failed 2 times: HTTP Error 500"):
            rewards.remote_reward(url, 10.0, 1)(EPISODES)
        assert len(bodies) == 2
    with pytest.raises(UserError, match="failed 1 times"):  # nobody listens there any more
        rewards.remote_reward(url, 10.0, 0)(EPISODES)


def test_a_service_that_answers_too_late_has_failed(pauses):
    with contextlib.closing(_silent()) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        with pytest.raises(UserError, match="failed 1 times: .*timed out"):
            rewards.remote_reward(url, 0.05, 0)(EPISODES)


def _silent():
    """A socket that takes connections and never answers."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def test_wrong_numbers_of_a_service_are_a_mistake_and_not_tried_again(pauses):
    with service(b'{"scores": [1]}') as (url, bodies):
        with pytest.raises(UserError, match="1 numbers where 2 were needed"):
            rewards.remote_reward(url, 10.0, 5)(EPISODES)
        assert len(bodies) == 1
    assert pauses == []


# --- sums and ensembles ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregate", "coefficient", "expected"),
    [
        ("mean", 0.5, [3.0, 0.0]),
        ("min", 0.5, [1.0, -2.0]),
        ("uncertainty", 0.5, [3.0 - 0.5 * 14 / 3, 0.0 - 0.5 * 8 / 3]),
        ("uncertainty", 0.0, [3.0, 0.0]),
    ],
)
def test_an_ensemble_by_hand(aggregate, coefficient, expected):
    # member scores of the first episode are 1, 2, 6 (variance 14/3), of the second -2, 2, 0 (8/3)
    members = [fixed(1, -2), fixed(2, 2), fixed(6, 0)]
    assert rewards.ensemble(members, aggregate, coefficient)(EPISODES) == pytest.approx(expected)


def test_a_weighted_sum_by_hand():
    total = rewards.weighted_sum([(2.0, fixed(1, -1)), (-0.5, fixed(4, 10))])
    assert total(EPISODES) == [0.0, -7.0]
    assert rewards.weighted_sum([])(EPISODES) == [0.0, 0.0]


def test_the_running_scale_is_the_deviation_of_all_scores_so_far():
    torch.manual_seed(0)
    batches = [torch.randn(n, dtype=torch.float64) * s + 100 for n, s in ((3, 1), (1, 5), (40, 9))]
    scale = RunningScale()
    for i, batch in enumerate(batches):
        scale.update(len(batch), batch.sum().item(), batch.square().sum().item())
        expected = torch.cat(batches[: i + 1]).std().item()
        assert scale.std == pytest.approx(expected, rel=1e-6)
    assert scale.mean == pytest.approx(torch.cat(batches).mean().item())


def test_the_running_scale_of_equal_scores_stays_finite():
    scale = RunningScale()
    scale.update(4, 12.0, 36.0)
    assert scale.std == 1e-4


# --- models, and how a config becomes terms -------------------------------------------------------


def saved(folder, tokenizer, seed: int = 1, bias: float = 0.0) -> str:
    tiny_models.reward(seed, bias=bias).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def terms(rm=None) -> build._Terms:
    return build._Terms(rm, tiny_models.tokenizer(), torch.device("cpu"), batch_size=2)


@pytest.fixture
def other_tokenizer(monkeypatch):
    """The same words by other numbers."""
    monkeypatch.setattr(tiny_models, "WORDS", tiny_models.WORDS[::-1])
    tokenizer = tiny_models.tokenizer()
    monkeypatch.undo()
    return tokenizer


def test_a_model_with_the_policys_tokenizer_reads_the_sampled_tokens(tmp_path):
    rm = saved(tmp_path, tiny_models.tokenizer(), bias=0.5)
    expected = score_sequences(
        tiny_models.reward(1, bias=0.5), EPISODES.queries, EPISODES.response_ids, 0
    )
    for name, given in ((rm, None), ("rm", tmp_path)):
        scores = terms(given).build(Reward(model=name))(EPISODES)
        assert scores == pytest.approx(expected, abs=1e-6)


def test_a_model_with_another_tokenizer_reads_the_text_by_its_own(tmp_path, other_tokenizer):
    path = saved(tmp_path, other_tokenizer)
    sequences = []
    for messages, response in zip(EPISODES.messages, EPISODES.responses, strict=True):
        prompt, (reply,) = encode_responses(other_tokenizer, messages, [response])
        sequences.append(prompt + reply)
    assert sequences[0] != EPISODES.queries[0] + EPISODES.response_ids[0]
    assert sequences[0][-1] == other_tokenizer.eos_token_id
    expected = score_sequences(tiny_models.reward(1), [[]] * len(sequences), sequences, 0)
    assert terms().build(Reward(model=path))(EPISODES) == pytest.approx(expected, abs=1e-6)
    direct = rewards.text_model_reward(tiny_models.reward(1), other_tokenizer, 8)(EPISODES)
    assert direct == pytest.approx(expected, abs=1e-6)


def test_the_models_of_an_ensemble_are_combined_and_loaded_once(tmp_path, monkeypatch):
    paths = [saved(tmp_path / str(seed), tiny_models.tokenizer(), seed) for seed in (1, 2)]
    loaded = []
    load = build.load_reward
    monkeypatch.setattr(
        build, "load_reward", lambda path, dtype: loaded.append(str(path)) or load(path, dtype)
    )
    made = terms()
    one, two = (made.build(Reward(model=path))(EPISODES) for path in paths)
    both = made.build(Reward(models=paths, aggregate="min"))(EPISODES)
    assert both == pytest.approx([min(a, b) for a, b in zip(one, two, strict=True)])
    uncertain = Reward(models=paths, aggregate="uncertainty", uncertainty_coef=2.0)
    expected = [(a + b) / 2 - 2 * ((a - b) / 2) ** 2 for a, b in zip(one, two, strict=True)]
    assert made.build(uncertain)(EPISODES) == pytest.approx(expected)
    assert loaded == paths


def test_functions_and_services_are_built_with_their_options(own, pauses):
    assert terms().build(Reward(function=own(right), timeout=9.0))(EPISODES) == [1.0, 0.0]
    with service(500, GOOD) as (url, _):
        assert terms().build(Reward(url=url, retries=1, timeout=9.0))(EPISODES) == [0.5, -1.0]


# --- the config -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"model": "rm", "function": "a.b:c"},
        {"models": ["rm"], "url": "http://localhost"},
        {"weight": 2.0},
    ],
)
def test_a_reward_is_of_exactly_one_kind(keys):
    with pytest.raises(ValidationError, match="exactly one of model, models, function and url"):
        Reward(**keys)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"model": "rm", "aggregate": "min"}, "aggregate"),
        ({"models": ["a", "b"], "uncertainty_coef": 0.1}, "uncertainty_coef"),
        ({"models": ["a", "b"], "aggregate": "min", "uncertainty_coef": 0.1}, "uncertainty_coef"),
        ({"url": "http://localhost", "per_token": True}, "per_token"),
        ({"model": "rm", "timeout": 3.0}, "timeout"),
        ({"function": "a.b:c", "per_token": True, "timeout": 3.0}, "timeout"),
        ({"function": "a.b:c", "retries": 5}, "retries"),
    ],
)
def test_an_option_without_effect_is_refused(keys, name):
    with pytest.raises(ValidationError, match=f"{name} has no effect on this kind of reward"):
        Reward(**keys)


@pytest.mark.parametrize("keys", [{"retries": -1}, {"timeout": 0}, {"uncertainty_coef": -0.1}])
def test_options_out_of_range_are_refused(keys):
    kind = {"models": ["a"], "aggregate": "uncertainty"} if "uncertainty_coef" in keys else {}
    with pytest.raises(ValidationError, match="greater than"):
        Reward(**(kind or {"url": "http://localhost"}), **keys)


def test_what_each_kind_may_have():
    assert Reward(models=["a", "b"], aggregate="uncertainty", uncertainty_coef=1.0).weight == 1.0
    assert Reward(function="a.b:c", timeout=2.0, weight=-0.5).members() == []
    assert Reward(url="http://localhost", timeout=2.0, retries=0).retries == 0
    assert Reward(function="a.b:c", per_token=True).per_token
    assert Reward(model="rm", aggregate="mean").members() == ["rm"]  # a default may be written out


def test_a_reward_model_from_elsewhere_scores_as_transformers_does(tmp_path):
    """A decoder without a pad token of its own, and an encoder that pools: both as they ship."""
    from transformers import BertConfig, BertForSequenceClassification

    from pipeline.ppo.build import _Terms

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=29, intermediate_size=16, num_labels=1, **sizes)
    ).eval()
    for name, model in {"llama": tiny_models.reward(1), "bert": bert}.items():
        folder = tmp_path / name
        model.save_pretrained(folder)
        other = tiny_models.tokenizer(pad_is_eos=True)
        other.add_tokens(["another"])  # so that it is another tokenizer, larger than the embedding
        other.save_pretrained(folder)
        terms = _Terms(None, tiny_models.tokenizer(), torch.device("cpu"), 8)
        episodes = rewards.Episodes(
            queries=[[0], [0]],
            response_ids=[[], []],
            prompts=["w1", "w2 w3"],
            responses=["w4 w5", "w6"],
            rows=[{}, {}],
            messages=[[{"role": "user", "content": text}] for text in ("w1", "w2 w3")],
        )
        got = terms.build(Reward(model=str(folder)))(episodes)
        for text, score in zip(("w1 <bot> w4 w5 <end>", "w2 w3 <bot> w6 <end>"), got, strict=True):
            ids = other(f"<user> {text}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                assert model(input_ids=ids).logits[0, 0].item() == pytest.approx(score, abs=1e-5)
