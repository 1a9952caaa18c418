"""Which stage is bad: plain sentences from a run's record, every threshold named in them.

The thresholds are rules of thumb. Human comparisons let reward models reach .63 to .72 (arXiv
2403.17031, 2203.02155), and PPO drifts that end below SFT show a KL of tens of nats.
"""

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.schema import AlarmLimits
from pipeline.evaluation.record import Record, ends, rankings, values
from pipeline.ppo import alarms

Level = Literal["good", "watch", "bad"]
RANK: dict[str, int] = {"good": 0, "watch": 1, "bad": 2}
TITLES = {"sft": "Supervised fine-tuning", "rm": "Reward model", "ppo": "PPO"}

EOS_WATCH, EOS_BAD = 0.98, 0.90
ACCURACY_WATCH = 0.60
JUDGE_ACCURACY_WATCH = 0.70
CALIBRATION_WATCH = 0.10
LENGTH_WATCH = 0.50
KL_WATCH, KL_BAD = 10.0, 40.0
ENTROPY_WATCH = 0.20
CLIP_WATCH = 0.30
RATIO_WATCH = 0.05
LONGER_WATCH = 1.5


@dataclass
class Finding:
    """One thing that was looked at."""

    level: Level
    text: str


@dataclass
class Verdict:
    """All findings about one stage; its level is that of the worst."""

    stage: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def level(self) -> Level:
        if not self.findings:
            return "watch"
        return max(self.findings, key=lambda finding: RANK[finding.level]).level

    @property
    def title(self) -> str:
        return TITLES[self.stage]

    def add(self, level: Level, text: str) -> None:
        self.findings.append(Finding(level, text))

    def grade(self, good: bool, text: str, otherwise: Level = "bad") -> None:
        """A finding that is good or else something worse."""
        self.add("good" if good else otherwise, text)


def verdicts(record: Record) -> list[Verdict]:
    """One verdict for each of sft, rm and ppo that the run has."""
    looks = {"sft": _sft, "rm": _rm, "ppo": _ppo}
    out = []
    for stage, look in looks.items():
        if stage in record.stages:
            verdict = Verdict(stage)
            look(record, verdict)
            if not verdict.findings:
                verdict.add("watch", "Nothing was measured yet: run make eval.")
            out.append(verdict)
    return out


def conclusion(found: list[Verdict]) -> str:
    """The stage to look at first, in one sentence."""
    bad = [v for v in found if v.level == "bad"]
    watch = [v for v in found if v.level == "watch"]
    if not found:
        return "No stage has been made yet."
    if bad:
        later = " Later stages build on it; mend it first." if bad[0] is not found[-1] else ""
        return f"Bad: {bad[0].title}.{later}"
    if watch:
        return f"No stage is bad; look at: {', '.join(v.title for v in watch)}."
    return "Every stage passes its checks."


# --- stages ---------------------------------------------------------------------------------------


def _sft(record: Record, verdict: Verdict) -> None:
    metrics, sft = record.stages["sft"].metrics, record.model("sft")
    before, after = (
        metrics.get("validation_perplexity_before"),
        metrics.get("validation_perplexity"),
    )
    if before is not None and after is not None:
        verdict.grade(
            after < before,
            f"Held-out perplexity went from {before:.3g} to {after:.3g} (bad unless it falls).",
        )
    if "ended" in sft:
        _ended(verdict, sft["ended"])
    versus = record.comparison("sft_vs_base")
    if versus:
        _wins(verdict, versus, "the base model")


def _rm(record: Record, verdict: Verdict) -> None:
    measured = rankings(record.held_out)
    if measured is not None:
        accuracy, baseline = measured.accuracy.share, measured.length_baseline
        text = (
            f"Accuracy on {measured.accuracy.pairs} held-out pairs is {accuracy:.3f}, 'the longer one "
            f"wins' gets {baseline:.3f}"
        )
        if measured.interval.low <= 0.5 or accuracy <= baseline:
            verdict.add("bad", text + " (bad: no better than chance or than length).")
        else:
            enough = accuracy >= ACCURACY_WATCH
            verdict.grade(enough, text + f" (watch below {ACCURACY_WATCH:.2f}).", "watch")
        error = measured.calibration_error
        verdict.grade(
            error <= CALIBRATION_WATCH,
            f"Its probabilities are off by {error:.3f} on average (watch above {CALIBRATION_WATCH:.2f}).",
            "watch",
        )
        verdict.grade(
            abs(measured.pearson) <= LENGTH_WATCH,
            f"Scores correlate with length by {measured.pearson:+.2f} (watch beyond {LENGTH_WATCH:.1f}).",
            "watch",
        )
    against = record.result.get("rm") or {}
    if against.get("accuracy") is not None:
        _against_judge(verdict, against)


def _against_judge(verdict: Verdict, against: dict) -> None:
    accuracy, baseline = against["accuracy"], against["length_baseline"]
    text = (
        f"It agrees with the judge on {accuracy:.3f} of {against['pairs']} untied pairs of SFT "
        f"responses; length alone gets {baseline:.3f}"
    )
    if against["accuracy_low"] <= 0.5 or accuracy <= baseline:
        verdict.add("bad", text + " (bad: no better than chance or than length).")
    else:
        enough = accuracy >= JUDGE_ACCURACY_WATCH
        verdict.grade(enough, text + f" (watch below {JUDGE_ACCURACY_WATCH:.2f}).", "watch")
    best = against.get("best_of_n") or []
    if len(best) > 1:
        first, last = best[0]["judge"], best[-1]["judge"]
        verdict.grade(
            last > first,
            f"The best of {best[-1]['n']} by its score gets {last:.2f} from the judge, any one "
            f"{first:.2f} (bad unless picking by it helps).",
        )


def _ppo(record: Record, verdict: Verdict) -> None:
    curve = record.curves.get("ppo", [])
    scores = ends(curve, "objective/scores")
    if scores:
        verdict.grade(
            scores[1] > scores[0],
            f"The score it optimises went from {scores[0]:.3f} to {scores[1]:.3f} (bad unless it rises).",
        )
    versus = record.comparison("ppo_vs_sft")
    if versus:
        _wins(verdict, versus, "SFT")
        by_rm = record.comparison("ppo_vs_sft_by_rm")
        if by_rm and by_rm["rate"] > 0.5 and versus["high"] < 0.5:
            verdict.add(
                "bad",
                f"Over-optimised: the reward model prefers it in {by_rm['rate']:.0%} of prompts, the "
                f"judge in {versus['rate']:.0%}. Raise kl_coef, or mend the reward model.",
            )
        _groups(verdict, versus)
    kl = (record.result.get("kl") or {}).get("ppo_vs_sft")
    if kl is None and (logged := ends(curve, "objective/kl")):
        kl = logged[1]
    if kl is not None:
        text = f"KL to SFT is {kl:.2f} nats per response (watch above {KL_WATCH:.0f}, bad above {KL_BAD:.0f})."
        verdict.add("bad" if kl > KL_BAD else "watch" if kl > KL_WATCH else "good", text)
    _answers(record, verdict)
    _alarms(record, verdict)
    _optimisation(curve, verdict)


def _groups(verdict: Verdict, versus: dict) -> None:
    """Kinds of prompts that got worse though the whole may have got better."""
    for key, members in (versus.get("groups") or {}).items():
        for value, rate in members.items():
            if rate["high"] < 0.5:
                verdict.add(
                    "watch",
                    f"{key} {value}: wins only {rate['rate']:.0%} against SFT, worse than even.",
                )


def _answers(record: Record, verdict: Verdict) -> None:
    ppo, sft = record.model("ppo"), record.model("sft")
    if "ended" in ppo:
        _ended(verdict, ppo["ended"])
    if "length" in ppo and sft.get("length"):
        ratio = ppo["length"] / sft["length"]
        verdict.grade(
            1 / LONGER_WATCH <= ratio <= LONGER_WATCH,
            f"Responses are {ratio:.2f} times as long as SFT's (watch beyond {LONGER_WATCH}, either way).",
            "watch",
        )


def _alarms(record: Record, verdict: Verdict) -> None:
    """What rang while it ran, and when that began."""
    curve, ppo = record.curves.get("ppo", []), record.stages["ppo"]
    limits = AlarmLimits.model_validate(ppo.config.get("alarms") or {})
    for name, meaning in alarms.meanings(limits).items():
        rang = [step for step, value in values(curve, f"alarm/{name}") if value]
        if rang:
            until = "on" if rang[-1] == curve[-1]["step"] else f"to {rang[-1]:.0f}"
            verdict.add("watch", f"Alarm from iteration {rang[0]:.0f} {until}: {meaning}.")


def _optimisation(curve: list[dict], verdict: Verdict) -> None:
    """Health of the update itself; sentences only about what is not healthy."""
    entropy = ends(curve, "policy/entropy_avg")
    if entropy and entropy[0] > 0 and entropy[1] < ENTROPY_WATCH * entropy[0]:
        verdict.add(
            "watch",
            f"Entropy fell to {entropy[1] / entropy[0]:.0%} of its start (watch below "
            f"{ENTROPY_WATCH:.0%}): the policy gives nearly the same answer each time.",
        )
    explained = ends(curve, "val/explained_variance")
    if explained and explained[1] < 0:
        verdict.add(
            "watch",
            f"The value network explains {explained[1]:.2f} of the variance of returns (watch below "
            "0): worse than a constant; raise value_learning_rate or vf_coef.",
        )
    clipped = ends(curve, "policy/clipfrac_avg")
    if clipped and clipped[1] > CLIP_WATCH:
        verdict.add(
            "watch",
            f"{clipped[1]:.0%} of tokens are clipped (watch above {CLIP_WATCH:.0%}): lower "
            "learning_rate or ppo_epochs.",
        )
    ratio = ends(curve, "val/ratio")
    if ratio and abs(ratio[1] - 1) > RATIO_WATCH:
        verdict.add("watch", f"The mean ratio is {ratio[1]:.3f} (watch beyond 1 ± {RATIO_WATCH}).")


def _ended(verdict: Verdict, share: float) -> None:
    level: Level = "bad" if share < EOS_BAD else "watch" if share < EOS_WATCH else "good"
    verdict.add(
        level,
        f"{share:.1%} of responses end by themselves (watch below {EOS_WATCH:.0%}, bad below {EOS_BAD:.0%}).",
    )


def _wins(verdict: Verdict, versus: dict, other: str) -> None:
    text = (
        f"The judge prefers it to {other} in {versus['rate']:.1%} of prompts "
        f"(95 % interval {versus['low']:.1%} to {versus['high']:.1%}; bad when all below 50 %, "
        "watch when 50 % is inside)."
    )
    level: Level = "bad" if versus["high"] < 0.5 else "watch" if versus["low"] <= 0.5 else "good"
    verdict.add(level, text)
