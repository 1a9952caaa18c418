"""Recipes in a temporary folder, and stages that publish a few bytes instead of training."""

from pathlib import Path

from pipeline.config.load import load_config
from pipeline.config.schema import BaseConfig, StageConfig
from pipeline.handoff.artifacts import Manifest, publish, publish_directory
from pipeline.run import StageRun
from pipeline.steps import config_class, stages

CONFIGS = {
    "base": "builder: tiny\n",
    "sft": "model: checkpoints/base/tiny\ndata: {path: checkpoints/base/tiny/data/d.jsonl}\n",
    "rm": "data: {path: rankings.jsonl}\n",
    "ppo": "prompts: {path: checkpoints/base/tiny/data/p.jsonl}\n",
}


def write_recipe(root: Path, **configs: str) -> Path:
    """`root/configs/tiny` and the one data file that nothing makes."""
    recipe = root / "configs" / "tiny"
    recipe.mkdir(parents=True, exist_ok=True)
    for step, text in {**CONFIGS, **configs}.items():
        (recipe / f"{step}.yaml").write_text(text)
    (root / "rankings.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return recipe


def config_of(root: Path, stage: str, run: str = "tiny", *words: str) -> StageConfig:
    config = load_config(config_class(stage), root / "configs" / "tiny" / f"{stage}.yaml", words)
    return config.model_copy(update={"run": Path("checkpoints") / run})


def make_base(root: Path) -> Path:
    staging = root / "staging"
    (staging / "data").mkdir(parents=True)
    for name in ("data/d.jsonl", "data/p.jsonl", "model.safetensors"):
        (staging / name).write_text('{"prompt": "a", "completion": "b"}\n')
    config = load_config(BaseConfig, root / "configs" / "tiny" / "base.yaml")
    return publish_directory(staging, Path("checkpoints/base/tiny"), config)


def train(config: StageConfig, content: bytes = b"weights", dataset=None) -> Path:
    """What a stage does, in a millisecond."""
    with StageRun(config, dataset) as stage:
        stage.tracker.log(1, {"loss": 1.0})
        (stage.output / "model.safetensors").write_bytes(content)
        return stage.publish({"loss": 1.0})


def make_all(root: Path, run: str = "tiny") -> None:
    """Base and the three stages."""
    if not Path("checkpoints/base/tiny").exists():
        make_base(root)
    for stage in stages():
        train(config_of(root, stage, run))


def make_anything(directory: Path, manifest: Manifest) -> Path:
    staging = directory.with_name("staging")
    staging.mkdir(parents=True)
    (staging / "model.safetensors").write_bytes(b"weights")
    return publish(staging, directory, manifest)
