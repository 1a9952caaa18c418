"""People rank a run's responses on a page in the browser: `python -m pipeline.commands.label --run checkpoints/tiny`.

Samples what is to be ranked (or takes `RUN/to_rank.jsonl`, or --import), then serves the page until Ctrl-C. All that
is said lies in `RUN/labels.db`.
"""

import argparse
import contextlib
import getpass
import importlib.util
import math
import socket
import sqlite3
import sys
from pathlib import Path
from urllib.parse import urlsplit

from pipeline import steps
from pipeline.cli import reporting_errors
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import Data
from pipeline.errors import UserError
from pipeline.feedback.store import Store
from pipeline.handoff.found import Stage, check_there, find_stages, need_first
from pipeline.handoff.remembered import Asked, command
from pipeline.process import disk
from pipeline.process.progress import say

PACKAGES = ("starlette", "uvicorn", "krippendorff", "choix")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(argv: list[str] | None = None) -> None:
    """Command line of `make label`."""
    args = parser().parse_args(argv)
    checked(args)
    stages = find_stages(args.run)
    check_there(args.run)
    store = Store(args.run / "labels.db")
    try:
        of_chat(store, args.run)
        if args.export:
            exported(store, args)
            return
        listening = bound(args.host, args.port)
        guide(store, args.guideline)
        collect(store, stages, args)
        serve(store, listening, args)
    except sqlite3.OperationalError as error:
        if not disk.is_full(error):
            raise
        raise UserError(
            f"{store.path}: the disk is full; what was saved before is whole: make room and run the "
            "same command again"
        ) from None


def parser() -> argparse.ArgumentParser:
    """Arguments of `python -m pipeline.commands.label`."""
    out = argparse.ArgumentParser(prog="python -m pipeline.commands.label", description=__doc__)
    out.add_argument("--run", type=Path, required=True)
    what = out.add_argument_group("what is ranked")
    models = "the run's stages, or OTHER/ppo; default: its newest"
    what.add_argument("--models", nargs="+", default=[], help=models)
    what.add_argument("--prompts", help="file or hub id; default: PPO's prompts")
    what.add_argument("--number", type=int, default=100, help="prompts (default: 100)")
    what.add_argument("--k", type=int, default=4, help="responses to each, 2 to 9 (default: 4)")
    what.add_argument("--temperature", type=float, default=1.0)
    longest = "default: what PPO was trained with, else 128"
    what.add_argument("--max-new-tokens", type=int, help=longest)
    what.add_argument("--seed", type=int, default=1)
    rows = "rows of prompt and responses, perhaps with ranks, in the place of what is sampled"
    what.add_argument("--import", type=Path, dest="imported", metavar="FILE", help=rows)
    people = out.add_argument_group("who ranks")
    people.add_argument("--name", help="yours, on this machine (default: the user's)")
    people.add_argument("--invite", nargs="+", default=[], metavar="NAME", help="print links")
    share = "share of the tasks that several rank (default: .2)"
    people.add_argument("--overlap", type=float, default=0.2, help=share)
    people.add_argument("--votes", type=int, default=3, help="and how many do (default: 3)")
    checks = "share of the tasks that check attention (default: .05)"
    people.add_argument("--checks", type=float, default=0.05, help=checks)
    people.add_argument("--guideline", type=Path, help="Markdown; a changed one is a new version")
    page = out.add_argument_group("the page")
    page.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    page.add_argument("--port", type=int, default=8765, help="0: any free one (default: 8765)")
    page.add_argument(
        "--public", default="", help="its address, where a server with TLS is in front"
    )
    page.add_argument("--export", type=Path, metavar="FILE", help="write what people said, and end")
    return out


def checked(args: argparse.Namespace) -> None:
    """UserError for what cannot be, all that a look at the words tells."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"label: needs {', '.join(missing)}: python -m pip install starlette uvicorn krippendorff choix"
        )
    bounds = {
        "--k is from 2 to 9": 2 <= args.k <= 9,
        "--number is at least 1": args.number >= 1,
        "--temperature is above 0": 0 < args.temperature < math.inf,
        "--max-new-tokens is at least 1": args.max_new_tokens is None or args.max_new_tokens >= 1,
        "--overlap is from 0 to 1": 0 <= args.overlap <= 1,
        "--checks is below .5": 0 <= args.checks < 0.5,
        "--votes is at least 2": args.votes >= 2,
        "--port is from 0 to 65535": 0 <= args.port <= 65535,
        "--public is an address such as https://rank.example.org": not args.public
        or urlsplit(args.public).scheme in ("http", "https"),
    }
    if told := [text for text, fits in bounds.items() if not fits]:
        raise UserError("; ".join(told))
    for path in (args.imported, args.guideline):
        if path is not None and not path.is_file():
            raise UserError(f"{path}: no such file")


def guide(store: Store, given: Path | None) -> None:
    """The guideline that was given, or a first one."""
    if given is not None:
        store.guide(given.read_text(encoding="utf-8", errors="replace"))
    elif store.guideline()[0] == 0:
        import pipeline.feedback.store as package

        first = Path(package.__file__).with_name("page") / "guideline.md"
        store.guide(first.read_text(encoding="utf-8"))


def of_chat(store: Store, run: Path) -> None:
    """Take what was said in `make chat` (`/better`, `/worse`) as labels; the same again adds nothing."""
    from pipeline.feedback.exchange import bring

    file = run / "ratings.jsonl"
    if file.is_file() and (number := bring(store, file).get("labels")):
        say(f"label: {number} judgements of make chat, from {file}")


def collect(store: Store, stages: dict[str, Stage], args: argparse.Namespace) -> None:
    """See that there is something to rank. UserError when there is not."""
    from pipeline.feedback.exchange import bring

    waiting = args.run / "to_rank.jsonl"
    file = args.imported or (waiting if waiting.is_file() and not args.models else None)
    if file is not None:
        told = bring(store, file, args.overlap, args.votes)
        say(f"label: {file}: " + (", ".join(f"{n} {what}" for what, n in told.items()) or "known"))
    else:
        sampled(store, stages, args)
    if not store.tasks():
        raise UserError(
            f"{store.path}: nothing to rank: no prompt without ranks has two different responses"
        )


def sampled(store: Store, stages: dict[str, Stage], args: argparse.Namespace) -> None:
    """Sample what is not there yet."""
    need_first(args.run, stages, "no model whose responses could be ranked yet")
    models = chosen(stages, args)
    prompts = prompts_of(args)
    say(
        f"label: {args.number} prompts of {prompts.path}, {args.k} responses each, by {', '.join(models)}"
    )
    from pipeline.feedback.tasks import Wanted, sample  # torch

    trained = stages["ppo"].config.get("max_new_tokens") if "ppo" in stages else None
    wanted = Wanted(
        models=models,
        prompts=prompts,
        number=args.number,
        k=args.k,
        max_new_tokens=args.max_new_tokens or int(trained or 128),
        temperature=args.temperature,
        seed=args.seed,
        reward=stages["rm"].path if "rm" in stages else None,
        checks=args.checks,
    )
    added = sample(store, wanted, args.overlap, args.votes)
    say(f"label: {added} tasks added" if added else "label: all of them are there")


def chosen(stages: dict[str, Stage], args: argparse.Namespace) -> dict[str, Path]:
    """The models by name. UserError for one that is not there."""
    own = {name: stages[name].path for name in steps.policies() if name in stages}
    out = {}
    for name in args.models or [list(own)[-1]]:
        path = own.get(name, Path(name))
        if not path.is_dir():
            there = ", ".join(own)
            raise UserError(
                f"--models {name}: no such model; this run has {there}, others are folders such as "
                f"{args.run.with_name('other') / 'ppo'}"
            )
        out[name] = path
    return out


def prompts_of(args: argparse.Namespace) -> Data:
    """The prompts that were given, or those of the run's PPO, made or not."""
    if args.prompts:
        return Data(path=args.prompts)
    made = Asked(run=args.run).of("ppo")
    config = steps.load("ppo", made.config, made.settings)
    assert isinstance(config, PPOConfig)
    if config.prompts is None:
        raise UserError(f"{made.config}: no prompts; say which: --prompts FILE")
    return config.prompts


def exported(store: Store, args: argparse.Namespace) -> None:
    """Write what people said to a file, and into `RUN/to_rank.jsonl` where it waits for ranks."""
    from pipeline.feedback.exchange import export, exportable, fill

    waiting = args.run / "to_rank.jsonl"
    exportable(store, args.export)  # what stops here leaves both files as they were
    filled = fill(store, waiting) if waiting.is_file() else (0, 0)
    number = export(store, args.export)
    learn = f'SET="rm.sampling=null rm.data.path={args.export}"'
    say(
        f"label: {number} rankings in {args.export}; a reward model of them: {command(args.run, 'rm')} {learn}"
    )
    if any(filled):
        goes = (
            f"; {filled[1]} have none yet" if filled[1] else f": {command(args.run, 'rm')} goes on"
        )
        say(f"label: ranks put into {filled[0]} lines of {waiting}{goes}")


def serve(store: Store, listening: socket.socket, args: argparse.Namespace) -> None:
    """The page, until Ctrl-C."""
    import uvicorn

    from pipeline.feedback.server import Person, Site, build

    near = args.host in LOOPBACK
    port = listening.getsockname()[1]
    shown = f"[{args.host}]" if ":" in args.host else args.host
    public = args.public.rstrip("/") or f"http://{shown}:{port}"
    local = None
    if near and not args.public:
        name = args.name or getpass.getuser()
        local = Person(store.annotator(name, admin=True), name, True)
        say(
            f"label: {public}/ ranks, {public}/admin looks on (Ctrl-C ends; all is in {store.path})"
        )
    else:
        say(
            f"label: {public}/admin#{store.invite(args.name or 'admin', admin=True)} is the admin's link"
        )
        if not args.public:
            say(
                "label: what is sent can be read on its way. Put a server with TLS in front, and give its "
                "address: --host 127.0.0.1 --public https://rank.example.org; Caddy needs one line: "
                f"caddy reverse-proxy --from rank.example.org --to 127.0.0.1:{port}"
            )
    for name in args.invite:
        say(f"label: {name}: {public}/#{store.invite(name)}")
    config = uvicorn.Config(
        build(Site(store, local, args.public)),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=500,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
    said = sum(label.kind == "label" for label in store.labels())
    export = f'make label RUN={args.run.name} ARGS="--export labels.jsonl"'
    say(f"label: {said} rankings in {store.path}; as a file: {export}")


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. UserError when the port is in use, or the address not of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    out = socket.socket(family, socket.SOCK_STREAM)
    out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        out.bind((host, port))
        out.listen(128)
    except OSError as error:
        out.close()
        raise UserError(
            f"--host {host} --port {port}: {error.strerror or error}; give another one, or --port 0 for "
            "any that is free"
        ) from None
    return out


if __name__ == "__main__":
    with reporting_errors():
        main()
        sys.exit(0)
