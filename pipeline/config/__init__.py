"""Every key, documented where it is declared; strict YAML; overrides; no torch."""

from pipeline.config.load import load_config
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import BaseConfig, RMConfig, SFTConfig

__all__ = ["BaseConfig", "PPOConfig", "RMConfig", "SFTConfig", "load_config"]
