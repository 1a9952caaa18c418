"""What a person looks at while PPO runs: fixed prompts answered again and again."""

from collections.abc import Sequence

import torch

from pipeline.config.schema import PPOConfig
from pipeline.data.forms import load_prompts
from pipeline.models.generation import generate
from pipeline.ppo.rollout import Query
from pipeline.ppo.trainer import PPO
from pipeline.tracking.tracker import Tracker


class Watch:
    """Answers fixed prompts every `sample_every` iterations without touching PPO's randomness."""

    def __init__(self, config: PPOConfig, ppo: PPO, queries: Sequence[Query], tracker: Tracker):
        self.config, self.ppo, self.tracker = config, ppo, tracker
        self.queries = list(queries[:8])
        if config.sample_prompts is not None:
            self.queries = list(ppo.queries(load_prompts(config.sample_prompts)))
        self.last = -1

    def samples(self, last: bool = False) -> None:
        """Sample, score and record, when it is time: at the start, every so often, at the end."""
        at = self.ppo.iteration
        due = at % self.config.sample_every == 0 or last
        if not due or at == self.last or not self.ppo.accelerator.is_main_process:
            return
        self.last = at
        with torch.random.fork_rng():  # watching must not change what is watched
            torch.manual_seed(self.config.seed)
            self.tracker.samples(at, self._rows())

    def _rows(self) -> list[dict]:
        responses = generate(
            self.ppo.networks.policy,
            self.ppo.tokenizer,
            [q.ids for q in self.queries],
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            stop_tokens=tuple(self.config.stop_tokens),
        )
        episodes = self.ppo.episodes(self.queries, [r.ids for r in responses])
        scores = self.ppo.score(episodes)
        if self.ppo.token_score is not None:
            sums = map(sum, self.ppo.token_score(episodes))
            scores = [score + more for score, more in zip(scores, sums, strict=True)]
        return [
            {"prompt": q.text, "response": r.text, "score": s, "ended": r.ended}
            for q, r, s in zip(self.queries, responses, scores, strict=True)
        ]
