"""An OpenAI-compatible server of a run's policy: `python -m pipeline.commands.serve --run checkpoints/tiny`.

It is `transformers serve`, or vLLM's own server where that is installed, and answers this machine alone.
"""

import argparse
import importlib.util
import json
import os
import socket
import sys
from pathlib import Path

from huggingface_hub import constants

from pipeline import steps
from pipeline.cli import reporting_errors
from pipeline.errors import UserError
from pipeline.handoff import artifacts
from pipeline.handoff.found import find_stages, need_first
from pipeline.handoff.remembered import command
from pipeline.process.progress import say

HOST = "127.0.0.1"
NEEDED = ("fastapi", "uvicorn", "openai")
"""What transformers' server is written with."""


def main(argv: list[str] | None = None) -> None:
    """Command line of `make serve`; this process becomes the server."""
    args = parser().parse_args(argv)
    folder = policy(args.run, args.stage)
    words = server(folder.name, args.port)
    _check_port(args.port)
    say(f"serve: http://{HOST}:{args.port}/v1, model {folder.name!r}, any key; Ctrl-C ends it")
    os.chdir(folder.parent)  # so that clients call it by its stage's name
    os.environ["HF_HUB_OFFLINE"] = "1"
    Path(constants.HF_HUB_CACHE).mkdir(
        parents=True, exist_ok=True
    )  # its list of models looks there
    os.execv(sys.executable, [sys.executable, *words])


def parser() -> argparse.ArgumentParser:
    """Arguments of `python -m pipeline.commands.serve`."""
    out = argparse.ArgumentParser(prog="python -m pipeline.commands.serve", description=__doc__)
    out.add_argument("--run", type=Path, required=True)
    policies = [name for name, step in steps.stages().items() if step.policy]
    out.add_argument("--stage", choices=policies, help="default: the last policy")
    out.add_argument("--port", type=int, default=8000)
    return out


def policy(run: Path, stage: str | None) -> Path:
    """Folder of the policy to serve, looked through; UserError for one that cannot be."""
    stages = find_stages(run)
    need_first(run, stages, "nobody to serve yet")
    made = [name for name, step in steps.stages().items() if step.policy and name in stages]
    name = stage or made[-1]
    if name not in stages:
        raise UserError(f"{run / name}: not made yet; make it: {command(run, name)}")
    folder = stages[name].path.resolve()
    artifacts.read(folder, name)
    if json.loads((folder / "config.json").read_text()).get("is_encoder_decoder"):
        raise UserError(f"{folder}: an encoder-decoder, which these servers do not serve")
    return folder


def server(name: str, port: int) -> list[str]:
    """What Python runs to serve the folder `name`; UserError where no server is installed."""
    where = [name, "--host", HOST, "--port", str(port)]
    if importlib.util.find_spec("vllm"):
        return ["-m", "vllm.entrypoints.cli.main", "serve", *where]
    if lacking := [module for module in NEEDED if not importlib.util.find_spec(module)]:
        raise UserError(
            f"serve: {', '.join(lacking)} not installed: .venv/bin/pip install -e '.[serving]'"
        )
    return ["-m", "transformers.cli.transformers", "serve", *where]


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"serve: port {port}: {error}; another one: ARGS='--port 8001'"
            ) from None


if __name__ == "__main__":
    with reporting_errors():
        main()
