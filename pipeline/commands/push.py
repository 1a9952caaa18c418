"""An export, to the Hugging Face hub: `python -m pipeline.commands.push --run checkpoints/tiny --repo me/name`.

It tells what would go where, and sends nothing until `--upload` is given too; a new repository is private.
"""

import argparse
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pipeline import steps
from pipeline.cli import reporting_errors
from pipeline.commands.export import FOLDER, exported
from pipeline.commands.model_card import TO_FILL
from pipeline.errors import UserError
from pipeline.evaluation.record import load_record
from pipeline.handoff.artifacts import MANIFEST
from pipeline.handoff.remembered import command
from pipeline.process.files import walk
from pipeline.process.progress import say


def main(argv: list[str] | None = None) -> None:
    """Command line of `make push`."""
    args = parser().parse_args(argv)
    folder = args.run / FOLDER / (args.stage or exported(load_record(args.run))[0])
    _check(folder, args.run, args.repo)
    files = sorted(name for name in walk(folder) if name != MANIFEST)
    for name in files:
        say(f"  {(folder / name).stat().st_size:>13,}  {name}")
    if unfilled := (folder / "README.md").read_text(encoding="utf-8").count(TO_FILL):
        say(
            f"push: {folder / 'README.md'}: {unfilled} places are to be filled in, licences among them"
        )
    if not args.upload:
        say(
            f"push: {len(files)} files would go to {args.repo}; nothing was sent. To send them: ARGS=--upload"
        )
        return
    say(f"push: {_upload(folder, args.repo, files)}")


def parser() -> argparse.ArgumentParser:
    """Arguments of `python -m pipeline.commands.push`."""
    out = argparse.ArgumentParser(prog="python -m pipeline.commands.push", description=__doc__)
    out.add_argument("--run", type=Path, required=True)
    out.add_argument("--repo", required=True, help="owner/name on the hub")
    kinds = [kind for name in steps.stages() for kind in (name, f"{name}-ema")]
    out.add_argument("--stage", choices=kinds, help="which export; default: the last policy's")
    out.add_argument("--upload", action="store_true", help="really send it")
    return out


def _check(folder: Path, run: Path, repo: str) -> None:
    """UserError for what cannot be sent, and for a name that is none."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"REPO={repo}: {error}") from None
    if repo.count("/") != 1:
        raise UserError(f"REPO={repo}: owner/name, as on the hub")
    if not (folder / "README.md").is_file():
        raise UserError(f"{folder}: not exported yet: {command(run, 'export')}")


def _upload(folder: Path, repo: str, files: list[str]) -> str:
    """Send the files as one commit and return its address; UserError for whatever keeps it from that."""
    api = HfApi()
    try:
        ModelCard.load(folder / "README.md").validate()
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=files))
    except Exception as error:  # of the hub's client, and of the network under it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{repo}: not sent: {reason} (HF_TOKEN or `hf auth login` says who you are)"
        ) from None


if __name__ == "__main__":
    with reporting_errors():
        main()
