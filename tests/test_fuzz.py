"""Parsers of configs, manifests, states and rows: any input gives a value or a UserError, nothing else.

The fast tests try a few hundred inputs each; the slow ones more than 100,000 together.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import steps
from pipeline.config import strict_yaml
from pipeline.config.load import load_config
from pipeline.config.schema import Data
from pipeline.data.forms import load_demonstrations, load_prompts, load_texts
from pipeline.data.rankings import load_rankings
from pipeline.errors import UserError
from pipeline.handoff import artifacts, sealed
from pipeline.handoff.artifacts import Manifest, publish
from pipeline.process import faults
from pipeline.steps import config_class, overrides, split_settings, stages
from pipeline.tracking import tracker as tracking

FEW, VARIANTS = 200, 5

# --- inputs ---------------------------------------------------------------------------------------

NAMES = sorted({name for config in map(config_class, stages()) for name in config.model_fields})
COLUMNS = (
    "messages conversations instruction input output prompt completion text system history chosen "
    "rejected responses completions answers ranks scores role content from value label weight images tools "
    "output_1 output_2 preference parent_id"
).split()
words = st.sampled_from(
    [*NAMES, *"path split columns r alpha : - [ ] { } , # & * ! ? | > % @ ` ' \" \n".split(" ")]
    + ["  ", ": ", "\n  - ", "1e-5", "1e400", ".nan", "~", "true", "0x1f", "1:30", "<<", "\t", "é"]
    + ["!!python/name:os.system", "!!int", "9" * 400, "\u2028", "\x00", "\ud800", "---\n", "..."]
)
yaml_texts = st.lists(words, max_size=12).map("".join) | st.text(max_size=30)
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(2**63), 1e308])
dialogues = st.lists(
    st.sampled_from(
        ["\n\nHuman: ", "\n\nAssistant:", "### Human: ", "### Assistant: ", "Human:", "a", "\n"]
        + ["### Instruction: ", "### Input:", "### Response:"]
    ),
    max_size=5,
).map("".join)
texts = st.text(max_size=6) | st.sampled_from(COLUMNS) | dialogues
leaves = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(COLUMNS) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", 1]), "content": texts | leaves}
    ),
    max_size=3,
)
rows = st.dictionaries(st.sampled_from(COLUMNS), values | turns, max_size=4)
lines = (
    rows.map(json.dumps)
    | st.text(max_size=20)
    | st.lists(st.sampled_from([*'{}[],:"', "\\ud800", "1e999", "NaN", '"prompt"', "\\"]), max_size=12).map("".join)
)  # fmt: skip
files = st.lists(lines, max_size=3).map(
    lambda given: "\n".join(given).encode("utf-8", "surrogatepass")
) | st.binary(max_size=40)
edits = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=4)
manifests = st.one_of(
    st.binary(max_size=40),
    st.dictionaries(st.sampled_from([*Manifest.model_fields, "x"]), values, max_size=5).map(
        lambda manifest: json.dumps(manifest).encode("utf-8", "surrogatepass")
    ),
    st.dictionaries(st.text(max_size=8), st.fixed_dictionaries({"size": values, "sha256": values})).map(
        lambda entries: json.dumps({"stage": "sft", "files": entries}).encode("utf-8", "surrogatepass")
    ),
    edits,
)  # fmt: skip


@cache
def folder() -> Path:
    """One place for all inputs: it is what is written there that differs."""
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


@cache
def artifact() -> tuple[Path, bytes]:
    staging = folder() / "staging"
    staging.mkdir()
    (staging / "model.safetensors").write_bytes(b"weights")
    final = publish(staging, folder() / "run" / "sft", Manifest(stage="sft"))
    return final, (final / "manifest.json").read_bytes()


def edited(content: bytes, change: Any) -> bytes:
    """Bytes as they are given, or the good content with some of its bytes replaced."""
    if isinstance(change, bytes):
        return change
    wrong = bytearray(content)
    for place, byte in change:
        wrong[place % len(wrong)] = byte
    return bytes(wrong)


# --- what they are given to -----------------------------------------------------------------------


def read_config(text: str) -> None:
    path = folder() / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for config in map(config_class, stages()):
        with_user_errors(load_config, config, path)


def override_config(text: str) -> None:
    path = folder() / "empty.yaml"
    path.write_text("model: m\n")
    chosen = with_user_errors(split_settings, text) or [text]
    chosen = with_user_errors(overrides, "sft", chosen) or chosen
    with_user_errors(load_config, config_class("sft"), path, chosen)


def parse_yaml(text: str) -> None:
    with_user_errors(strict_yaml.parse, text, "x.yaml")


def read_manifest(change: Any) -> None:
    final, good = artifact()
    (final / "manifest.json").write_bytes(edited(good, change))
    with_user_errors(artifacts.read, final)


@cache
def state() -> tuple[Path, bytes]:
    made = folder() / "step-000001"
    made.mkdir()
    (made / "state.pt").write_bytes(b"tensors")
    sealed.seal(made)
    return made, (made / "seal.json").read_bytes()


def read_seal(change: Any) -> None:
    directory, good = state()
    (directory / "seal.json").write_bytes(edited(good, change))
    sealed.fault(directory)


def read_rows(content: bytes) -> None:
    for name in ("rows.jsonl", "rows.json"):
        path = folder() / name
        path.write_bytes(content)
        data = Data(path=str(path))
        for load in (load_demonstrations, load_prompts, load_rankings, load_texts):
            with_user_errors(load, data, [])


def read_row(row: dict[str, Any]) -> None:
    for load in (load_demonstrations, load_prompts, load_rankings, load_texts):
        with_user_errors(load, [row], [])


def read_record(content: bytes) -> None:
    path = folder() / "metrics.jsonl"
    path.write_bytes(content)
    list(tracking.read_rows(path))


def plan_faults(text: str) -> None:
    os.environ["PIPELINE_FAULT"] = text.replace("\x00", "").encode("utf-8", "replace").decode()
    try:
        with_user_errors(faults.setup, "sft", steps.phases())
    finally:
        del os.environ["PIPELINE_FAULT"]
        faults.clear()


def with_user_errors(call: Callable, *arguments: Any) -> Any:
    with contextlib.suppress(UserError):
        return call(*arguments)


TARGETS: dict[str, tuple[st.SearchStrategy, Callable[[Any], None], int]] = {
    "config": (yaml_texts, read_config, 10_000),
    "override": (yaml_texts, override_config, 10_000),
    "yaml": (yaml_texts, parse_yaml, 25_000),
    "manifest": (manifests, read_manifest, 10_000),
    "seal": (manifests, read_seal, 15_000),
    "rows": (files, read_rows, 5_000),
    "row": (rows, read_row, 10_000),
    "record": (files, read_record, 10_000),
    "fault": (
        st.lists(st.sampled_from(["sft", "step", "kill", ":", ",", "3", "٣", " "]), max_size=9).map(
            "".join
        )
        | st.text(max_size=20),
        plan_faults,
        10_000,
    ),
}


def variants(value: Any) -> list[Any]:
    """`VARIANTS` inputs from one, which costs more to draw: cut short, doubled, turned, a key lost."""
    if isinstance(value, dict):
        keys = [*value, *range(VARIANTS)][: VARIANTS - 1]
        return [value, *({k: v for k, v in value.items() if k != key} for key in keys)]
    middle = len(value) // 2
    return [value, value[:middle], value[middle:], value * 2, value[::-1]]


def fuzz(name: str, count: int) -> None:
    strategy, target, _ = TARGETS[name]

    @settings(
        max_examples=count // VARIANTS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def check(value):
        for variant in variants(value):
            target(variant)

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_inputs(name):
    fuzz(name, FEW)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("name", TARGETS)
def test_many_inputs(name):
    fuzz(name, TARGETS[name][2])


def test_many_are_more_than_a_hundred_thousand():
    assert sum(count for _, _, count in TARGETS.values()) > 100_000
