"""A config as its stage will see it, every key with what it means (make show-config)."""

import argparse
import ast
import inspect
import itertools
import sys
import textwrap
from pathlib import Path

import yaml
from pydantic import BaseModel

from pipeline.config import schema
from pipeline.config.load import AddSettings, load_config, split_settings, stage_overrides
from pipeline.errors import UserError


def documented(config: BaseModel) -> str:
    """The resolved config as YAML, each key under the docstring of its declaration."""
    docs = _docs(type(config))
    lines: list[str] = []
    for key, value in config.model_dump(mode="json").items():
        for line in docs.get(key, "").splitlines():
            lines.append(f"# {line}")
        lines.append(yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True).rstrip())
    return "\n".join(lines)


def _docs(cls: type) -> dict[str, str]:
    """Field name -> the string that stands under its declaration, base classes included."""
    found: dict[str, str] = {}
    for kind in reversed(cls.__mro__):
        if not (issubclass(kind, BaseModel) and kind.__module__.startswith("pipeline.")):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field, text in itertools.pairwise(statements):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    found[field.target.id] = inspect.cleandoc(str(text.value.value))
    return found


def main(argv: list[str] | None = None) -> None:
    """Command line of `make show-config`."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.commands.show_config")
    parser.add_argument("--stage", required=True, choices=[*schema.STAGES, "base"])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument(
        "--set",
        action=AddSettings,
        default="",
        help='the words of SET, e.g. "ppo.kl_coef=0.02 seed=3"',
    )
    parser.add_argument("settings", nargs="*", help="key=value")
    args = parser.parse_args(argv)
    words = [*split_settings(args.set), *args.settings]
    cls = schema.STAGES.get(args.stage, schema.BaseConfig)
    config = load_config(cls, args.config, stage_overrides(args.stage, words))
    print(documented(config))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
