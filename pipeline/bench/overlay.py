"""A folder with the one package that a second environment would differ by.

Put first on the path of a worker, it shadows the environment's TRL and leaves all the rest: the same
interpreter, the same torch, the same transformers. It works for any environment that has pip.
"""

import subprocess
import sys
from pathlib import Path

from pipeline.errors import UserError
from pipeline.process.files import move, remove
from pipeline.process.progress import say

PACKAGE, VERSION = "trl", "1.12.0"
"""The last TRL that has PPO (removed in 1.13)."""


def overlay(folder: Path) -> Path:
    """The folder's absolute path, filled by pip first if it is not there yet."""
    if not is_filled(folder):
        say(f"bench: {folder} with {PACKAGE} {VERSION}, once")
        filling = folder.with_name(f"{folder.name}.new")
        remove(filling)
        _pip(filling)
        remove(folder)
        move(filling, folder)
    return folder.resolve()


def is_filled(folder: Path) -> bool:
    """Whether the package lies there, in this version."""
    return (folder / f"{PACKAGE}-{VERSION}.dist-info" / "METADATA").is_file()


def _pip(folder: Path) -> None:
    words = ["-qq", "--no-input", "--disable-pip-version-check", "install", "--no-deps"]
    wanted = f"{PACKAGE}=={VERSION}"
    command = [sys.executable, "-m", "pip", *words, "--target", str(folder), wanted]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(
            f"pip could not install {wanted} into {folder}:\n{done.stderr.strip()}\n"
            "Without it there is no PPO to compare with; `--cases rm-4 rm-9 sft` needs none."
        )
