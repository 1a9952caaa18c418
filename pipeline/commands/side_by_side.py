"""A run's models, asked the same thing: base, SFT and PPO answer side by side, with the reward model's scores."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from pipeline.handoff.found import Stage


def table(prompt: str, answers: list[tuple[str, str, bool, float | None]]) -> Table:
    """Answers as (model, text, ended, score), one row each."""
    title = Text(plain(prompt), style="bold")
    out = Table(title=title, title_justify="left", show_lines=True)
    out.add_column("model")
    out.add_column("response", ratio=1, overflow="fold")
    out.add_column("reward", justify="right")
    for name, text, ended, score in answers:
        response = Text(plain(text) or "(nothing)")
        if not ended:
            response.append(" … (cut off)", style="dim")
        cell = _Isolated(response) if _RIGHT_TO_LEFT.search(text) else response
        out.add_row(name, cell, "-" if score is None else f"{score:.2f}")
    return out


def plain(text: str) -> str:
    """A text that a terminal only shows."""
    return _CONTROLS.sub("\ufffd", text)


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What could move the cursor, colour the screen or turn the rest of a line around."""
_RIGHT_TO_LEFT = re.compile(
    "[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefe\U00010800-\U00010fff\U0001e800-\U0001efff]"
)


class _Isolated:
    """A text in a table whose lines of Arabic or Hebrew leave the cells beside them where they are:
    each is isolated (Unicode's annex 9: FSI, PDI), since a terminal takes the row for one line of text."""

    def __init__(self, text: Text):
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for line in self.text.wrap(console, options.max_width, overflow="fold"):
            line.rstrip()
            yield Text.assemble("\u2068", line, "\u2069")


@dataclass
class Room:
    """The models of a run, loaded once; a base model that cannot be loaded is said and left out."""

    stages: dict[str, Stage]
    max_new_tokens: int
    temperature: float = 1.0
    greedy: bool = False
    system: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        from pipeline.evaluation.evaluate import load_policies  # torch
        from pipeline.models.device import device
        from pipeline.models.loading import load_reward, load_tokenizer, quiet

        quiet()
        self.tokenizer = load_tokenizer(self.stages["sft"].path)
        self.models = load_policies(self.stages, self.tokenizer, "chat")
        rm = self.stages.get("rm")
        self.reward = load_reward(rm.path).to(device()) if rm else None

    def ask(self, prompt: str) -> list[tuple[str, str, bool, float | None]]:
        """Every model's answer as (model, text, ended, reward or None)."""
        import torch

        from pipeline.data.template import encode_prompt, scored_ids
        from pipeline.models.forward import score_sequences
        from pipeline.models.generation import generate
        from pipeline.models.tokens import pad_id

        messages = [{"role": "user", "content": prompt}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        ids = encode_prompt(self.tokenizer, messages)
        answers = []
        for name, model in self.models.items():
            if self.seed is not None:
                torch.manual_seed(self.seed)
            [response] = generate(
                model,
                self.tokenizer,
                [ids],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                greedy=self.greedy,
            )
            score = None
            if self.reward is not None:
                read = scored_ids(self.tokenizer, messages, response.ids)
                [score] = score_sequences(self.reward, [ids], [read], pad_id(self.tokenizer))
            answers.append((name, response.text, response.ended, score))
        return answers
