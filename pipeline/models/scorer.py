"""A reward model on an encoder-decoder: one number from its decoder's state at the response's end.

Stock classifiers of these kinds look for the end in the encoder's ids and have a head of two layers;
several kinds have none. So this is the one artifact that stock classes do not load.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from pipeline.models import encoder_decoder
from pipeline.models.sequences import Sequences


class EncoderDecoderScorer(PreTrainedModel):
    """A stock encoder-decoder `model` without its vocabulary's head, and a linear `score`, (d -> 1).

    The prompt goes to the encoder; the decoder reads its prefix and the whole response. `from_pretrained`
    takes its own folders and those of a policy, whose head is left out and `score` drawn.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.score = nn.Linear(config.d_model, 1, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any):  # type: ignore[override]
        if "config" not in kwargs:
            one = {"num_labels": kwargs.pop("num_labels", 1)}
            kwargs["config"] = AutoConfig.from_pretrained(path, **one)
        return super().from_pretrained(path, *args, **kwargs)

    def get_encoder(self, *args: Any, **kwargs: Any):
        """The stock encoder."""
        return self.model.get_encoder()

    def get_decoder(self, *args: Any, **kwargs: Any):
        """The stock decoder."""
        return self.model.get_decoder()

    def forward(self, s: Sequences) -> Tensor:
        """Scores (B,) of the responses, less the stored bias."""
        scores = self.score(encoder_decoder.hidden_at_end(self, s)).squeeze(-1)
        return scores - getattr(self.config, "reward_bias", 0.0)
