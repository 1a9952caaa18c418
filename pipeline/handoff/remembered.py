"""What a run was made with: `RUN/run.json` keeps the recipe, the run it borrows from, and each step's file
and settings, so that `make eval RUN=x` alone means that run as it is."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import steps
from pipeline.errors import UserError
from pipeline.process.files import Lock, write_atomically

FILE = "run.json"
EXPECTED = "expect.yaml"
"""In a recipe's folder: what its healthy runs look like (`pipeline.evaluation.expect`)."""
DEFAULT_RECIPE = Path("configs/tiny")


class Made(BaseModel):
    """The config file of a step and the words of SET that were put over it."""

    model_config = ConfigDict(extra="forbid")
    config: str
    settings: list[str] = []
    of_recipe: str = ""

    def __str__(self) -> str:
        return self.config + (f' with SET="{" ".join(self.settings)}"' if self.settings else "")


class Memory(BaseModel):
    """The contents of `run.json`."""

    model_config = ConfigDict(extra="forbid")
    recipe: str | None = None
    borrow: str | None = None
    steps: dict[str, Made] = {}


def recall(run: Path) -> Memory:
    """What a run remembers; nothing when it is new."""
    try:
        return Memory.model_validate_json((run / FILE).read_bytes())
    except FileNotFoundError:
        return Memory()
    except (OSError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{run / FILE}: cannot be read: {reason}\nIt holds the recipe, files and settings of the "
            "run; remove it to give them anew"
        ) from None


def expected_of(run: Path) -> Path:
    """Where a run's recipe says what its runs look like, if it does."""
    return Path(recall(run).recipe or "", EXPECTED)


def note(run: Path, name: str, made: Made, recipe: Path | None, borrow: Path | None) -> None:
    """Remember how a step is made; others that do so at the same moment lose nothing by it."""
    with Lock(run / ".work" / f"{FILE}.lock", wait=True):
        memory = recall(run)
        made.of_recipe = made.of_recipe if recipe is None else recipe.as_posix()
        memory.steps[name] = made
        memory.recipe = memory.recipe if recipe is None else recipe.as_posix()
        memory.borrow = memory.borrow if borrow is None else borrow.as_posix()
        write_atomically(run / FILE, json.dumps(memory.model_dump(), indent=1) + "\n")


def command(run: Path, *goals: str) -> str:
    """`make GOALS` for a run, as it is typed; the run remembers its recipe and settings."""
    place = run if run.name else run.resolve()
    return f"make {' '.join(goals)} RUN={place.name}{ckpt(place.parent)}"


def make_command(directory: Path, force: bool = True) -> str:
    """The make command that builds an artifact."""
    stage, run = directory.name, directory.parent
    words = command(run, stage)
    if run.name == "base":
        stage, words = "base", f"make base RECIPE={directory.name}{ckpt(run.parent)}"
    return f"{words} FORCE={stage}" if force else words


def ckpt(root: Path) -> str:
    """What a command says of the folder of runs where it is not the usual one."""
    return "" if root == Path("checkpoints") else f" CKPT={shlex.quote(str(root))}"


@dataclass
class Asked:
    """What a command line says of a run; the rest is what the run remembers."""

    run: Path
    recipe: Path | None = None
    files: dict[str, Path] = field(default_factory=dict)  # step -> config file
    settings: list[str] = field(default_factory=list)
    borrow: Path | None = None
    dry: list[str] = field(default_factory=list)
    """Settings below those asked for that make it a dry run; a step that is not looked at reads none."""

    def __post_init__(self) -> None:
        self.memory = recall(self.run)
        only = self.recipe and self.recipe.as_posix()
        made = self.memory.steps.items()
        self._kept = {name: m for name, m in made if only in (None, m.of_recipe)}
        lender = recall(self.borrow).recipe if self.borrow is not None else None
        self.recipe = self.recipe or Path(self.memory.recipe or lender or DEFAULT_RECIPE)
        self.lent = self.borrow is None and self.memory.borrow is not None
        """Nobody named the run that is borrowed from: this one was made so, and stays so."""
        if self.lent:
            self.borrow = Path(str(self.memory.borrow))

    def of(self, name: str) -> Made:
        """The file and settings of a step: those asked for, over those it was made with if the file is the same."""
        before = None if name in self.files else self._kept.get(name)
        assert self.recipe is not None
        own = Path(before.config) if before else self.recipe / f"{name}.yaml"
        asked = steps.overrides(name, [*self.dry, *self.settings])
        words = [*(before.settings if before else []), *asked]
        return Made(
            config=self.files.get(name, own).as_posix(),
            settings=_last_ones(words),
            of_recipe=before.of_recipe if before else self.recipe.as_posix(),
        )

    def replaces(self, name: str) -> str | None:
        """What a step was made from and would be made from now, where the run remembers another thing."""
        before, now = self.memory.steps.get(name), self.of(name)
        told = (str(before), str(now)) if before and before != now else None
        if before and self.borrow and self.memory.borrow not in (None, self.borrow.as_posix()):
            told = f"stages of {self.memory.borrow}", f"stages of {self.borrow}"
        return told and f"made from {told[0]}, would be replaced by one from {told[1]}"


def _last_ones(words: list[str]) -> list[str]:
    """`key=value` words, of those with the same key the last: it may be put over a group that holds it."""
    keys = [word.partition("=")[0] for word in words]
    return [word for i, word in enumerate(words) if keys[i] not in keys[i + 1 :]]
