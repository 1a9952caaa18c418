"""Talk with a run's policy: `python -m pipeline.commands.chat --run checkpoints/tiny [--compare | --prompt TEXT]`.

On a terminal until Ctrl-D; otherwise every line of standard input is something that is said.
"""

import argparse
import contextlib
import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.cli import reporting_errors
from pipeline.commands.side_by_side import Room, plain, table
from pipeline.data.messages import Message, message
from pipeline.errors import UserError
from pipeline.feedback.ratings import keep
from pipeline.handoff.found import Stage, find_stages, need_first
from pipeline.process.files import jsonl, sync
from pipeline.process.progress import say
from pipeline.steps import policies


def main(argv: list[str] | None = None) -> None:
    """Command line of `make chat`."""
    args = parser().parse_args(argv)
    if not 0 < args.temperature < math.inf:
        raise UserError("--temperature is above 0; for the likeliest answer use --greedy")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UserError("--max-new-tokens is at least 1")
    stages = find_stages(args.run)
    need_first(args.run, stages, "nobody to talk with yet")
    trained = stages["ppo"].config.get("max_new_tokens") if "ppo" in stages else None
    limit = args.max_new_tokens or int(trained or 128)
    asked = (args.temperature, args.greedy, args.system, args.seed)
    if args.compare or args.prompt:
        compare(Room(stages, limit, *asked), args.prompt)
    else:
        converse(Talk(args.run, stages, limit, *asked))


def parser() -> argparse.ArgumentParser:
    """Arguments of `python -m pipeline.commands.chat`."""
    out = argparse.ArgumentParser(prog="python -m pipeline.commands.chat", description=__doc__)
    out.add_argument("--run", type=Path, required=True)
    out.add_argument(
        "--prompt", action="append", help="ask all models this and end; may be repeated"
    )
    out.add_argument(
        "--compare", action="store_true", help="all models answer, side by side, scored"
    )
    out.add_argument("--system", help="a system message before all that is said")
    sampling = out.add_mutually_exclusive_group()
    sampling.add_argument("--greedy", action="store_true", help="the likeliest token each time")
    sampling.add_argument("--temperature", type=float, default=1.0)
    longest = "default: what PPO was trained with, else 128"
    out.add_argument("--max-new-tokens", type=int, help=longest)
    out.add_argument("--seed", type=int, help="the same seed gives the same answers")
    return out


def compare(room: Room, prompts: list[str] | None) -> None:
    """A table of answers to each prompt."""
    console = Console()
    for prompt in prompts or typed():
        try:
            console.print(table(prompt, room.ask(prompt)))
        except UserError as error:  # too long, say; the next one may not be
            if prompts:
                raise
            say(f"chat: {error}")


def converse(talk: "Talk") -> None:
    """Answers as they are written, and the commands that begin with a slash."""
    if sys.stdin.isatty():
        say(f"{talk.name} answers. /help tells what else there is; Ctrl-D ends.")
    for line in typed():
        try:
            if line.startswith("/") and not line.startswith("//"):
                say(talk.command(line))
            else:
                show(talk.ask(line.removeprefix("/")))
        except UserError as error:
            say(f"chat: {error}")


def typed() -> Iterator[str]:
    """What a person types until Ctrl-D, or the lines of standard input; blank ones skipped."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401 - gives input() a history and an editable line

    while True:
        try:
            line = input("> ").strip().encode("utf-8", "replace").decode()
        except EOFError:
            print()
            return
        if line:
            yield line


def show(pieces: Iterator[str]) -> None:
    """Print an answer while it is written; Ctrl-C ends it there."""
    with contextlib.suppress(KeyboardInterrupt):
        for piece in pieces:
            print(plain(piece), end="", flush=True)
    print(flush=True)


@dataclass
class Talk:
    """A conversation with one of a run's policies, each loaded when it is first asked."""

    run: Path
    stages: dict[str, Stage]
    max_new_tokens: int
    temperature: float = 1.0
    greedy: bool = False
    system: str | None = None
    seed: int | None = None
    messages: list[Message] = field(default_factory=list)
    before: str | None = None
    """Another answer to the last thing that was said."""

    def __post_init__(self) -> None:
        import torch

        from pipeline.models.loading import load_tokenizer, quiet

        quiet()
        self.tokenizer = load_tokenizer(self.stages["sft"].path)
        self.models: dict[str, Any] = {}
        self.name = [name for name in policies() if name in self.stages][-1]
        self._model()  # told now if it is not sound
        if self.seed is not None:
            torch.manual_seed(self.seed)  # once: /retry is to answer otherwise
        self.reset("")

    def ask(self, said: str) -> Iterator[str]:
        """Pieces of the answer to what is said."""
        return self._answer([*self.messages, message("user", said)], None)

    def _answer(self, asked: list[Message], before: str | None) -> Iterator[str]:
        from pipeline.data.template import encode_prompt
        from pipeline.models.generation import stream

        shown, ids = "", encode_prompt(self.tokenizer, asked)
        growing = stream(
            self._model(),
            self.tokenizer,
            ids,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            greedy=self.greedy,
        )
        try:
            for response in growing:
                piece, shown = response.text[len(shown) :], response.text
                yield piece
            yield "" if response.ended else " … (cut off)"
        finally:  # interrupted too: what was read was said
            self.messages, self.before = [*asked, message("assistant", shown)], before

    def _model(self) -> Any:
        from pipeline.models.device import device
        from pipeline.models.loading import load_policy

        if self.name not in self.models:
            loaded = load_policy(self.stages[self.name].path, self.tokenizer)
            self.models[self.name] = loaded.to(device())
        return self.models[self.name]

    # --- commands ---------------------------------------------------------------------------------

    def command(self, line: str) -> str:
        """Do what a line with a slash asks for; what there is to say of it."""
        name, _, rest = line[1:].partition(" ")
        if name not in COMMANDS:
            raise UserError(
                f"/{name}: no such command; /help tells what there is (//{name} says it)"
            )
        return COMMANDS[name][1](self, rest.strip())

    def help(self, _: str) -> str:
        """All commands."""
        return "\n".join(f"  /{name:<19} {told}" for name, (told, _) in COMMANDS.items())

    def reset(self, _: str) -> str:
        """Begin anew."""
        self.messages = [message("system", self.system)] if self.system else []
        self.before = None
        return "A new conversation."

    def set_system(self, text: str) -> str:
        """Another system message, or none, and a new conversation."""
        self.system = text or None
        return self.reset("")

    def retry(self, _: str) -> str:
        """Another answer to the same."""
        said, answer = self._last()
        show(self._answer(said, answer))
        return "/better or /worse than the one before?"

    def set_model(self, name: str) -> str:
        """Who answers from now on."""
        there = [policy for policy in policies() if policy in self.stages]
        if name not in there:
            raise UserError(f"/model: one of {', '.join(there)}; now it is {self.name}")
        before, self.name = self.name, name
        try:
            self._model()
        except UserError:
            self.name = before
            raise
        return f"{name} answers."

    def set_temperature(self, text: str) -> str:
        """0 is the likeliest answer."""
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise UserError(
                f"/temperature: a number from 0 (the likeliest answer) up, not {text!r}"
            )
        self.greedy, self.temperature = value == 0, value or 1.0
        return f"Temperature {value:g}."

    def save(self, name: str) -> str:
        """The conversation as a row that sft reads; no file is overwritten."""
        folder = self.run / "chats"
        numbered = (folder / f"{n}.jsonl" for n in range(1, sys.maxsize))
        path = Path(name) if name else next(path for path in numbered if not path.exists())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(jsonl([{"messages": self.messages, "model": self.name}]))
        except OSError as error:
            raise UserError(f"/save: {path}: {os.strerror(error.errno or 0)}") from None
        sync(path)
        return f"Saved: {path}"

    def rate(self, text: str) -> str:
        """How good the last answer is."""
        said, answer = self._last()
        if text not in map(str, range(1, 8)):
            raise UserError("/rate: a whole number from 1 (bad) to 7 (good)")
        return self._kept(said, [answer], rating=int(text))

    def better(self, text: str, rank: int = 1) -> str:
        """The last answer beside the one before it, or beside the person's own words."""
        said, answer = self._last()
        if text == answer.strip() and text:
            raise UserError("/better: these are the answer's own words; say it otherwise")
        if text:
            return self._kept(said, [text, answer], ranks=[1, 2])
        if self.before in (None, answer):
            raise UserError("two different answers are compared: /retry gives another one first")
        return self._kept(said, [answer, str(self.before)], ranks=[rank, 3 - rank])

    def worse(self, _: str) -> str:
        """The opposite of `better`."""
        return self.better("", rank=2)

    def _last(self) -> tuple[list[Message], str]:
        """All before the last answer, and that."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UserError("nothing was answered yet")
        return self.messages[:-1], self.messages[-1]["content"]

    def _kept(self, said: list[Message], responses: list[str], **judged: Any) -> str:
        return f"Kept: {keep(self.run, said, responses, model=self.name, **judged)}"


COMMANDS: dict[str, tuple[str, Callable[[Talk, str], str]]] = {
    "reset": ("begin anew", Talk.reset),
    "system": ("TEXT: a system message, and a new conversation", Talk.set_system),
    "model": ("NAME: who answers", Talk.set_model),
    "temperature": ("X: 0 is the likeliest answer", Talk.set_temperature),
    "retry": ("another answer to the same", Talk.retry),
    "rate": ("1 to 7: how good the answer is", Talk.rate),
    "better": (
        "than the answer before /retry; with a TEXT: that is better than the answer",
        Talk.better,
    ),
    "worse": ("than the answer before /retry", Talk.worse),
    "save": ("[FILE]: the conversation, as a row that sft reads", Talk.save),
    "help": ("this", Talk.help),
}


if __name__ == "__main__":
    with reporting_errors():
        main()
