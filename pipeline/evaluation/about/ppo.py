"""What the evaluation shows about PPO."""

from pipeline.evaluation.about import Chart, Verdict
from pipeline.evaluation.record import Record, ends
from pipeline.ppo import alarms

CLIP_WATCH = 0.30
RATIO_WATCH = 0.05

CHARTS = [
    chart._replace(x="iteration")
    for chart in (
        Chart("Score", {"score": "objective/scores"}),
        Chart("Score minus KL penalty", {"rlhf_reward": "objective/rlhf_reward"}),
        Chart("KL to SFT, nats per response", {"kl": "objective/kl"}, 0.0),
        Chart("Entropy, nats per token", {"entropy": "policy/entropy_avg"}),
        Chart(
            "Explained variance of the value network", {"explained": "val/explained_variance"}, 0.0
        ),
        Chart("Response length, tokens", {"length": "response/length"}),
        Chart("Share cut off at the limit", {"truncated": "response/truncated"}),
        Chart("Repeated 4-grams", {"repeated": "response/repeated_ngrams"}),
        Chart("Policy loss", {"policy": "loss/policy_avg"}),
        Chart("Value loss", {"value": "loss/value_avg"}),
        Chart("Clipped tokens", {"policy": "policy/clipfrac_avg", "value": "val/clipfrac_avg"}),
        Chart("Mean ratio", {"ratio": "val/ratio"}, 1.0),
        Chart("Score–length correlation", {"correlation": "objective/score_length_corr"}, 0.0),
    )
] + [
    Chart(
        "Score against KL: what each nat bought",
        {"score": "objective/scores"},
        x="KL to SFT, nats per response",
        over="objective/kl",
    )
]

EXPECTED = {
    "objective/scores": (
        "It does not learn this reward: learning_rate, kl_coef, or scores of the wrong sign or scale; at the first "
        "iteration: another reward or SFT model.",
        "Another reward, or one that is gamed: look at KL and at the samples.",
    ),
    "objective/kl": (
        "The policy hardly moves: learning_rate too low, kl_coef too high, or scores that are all alike.",
        "The policy goes too far: learning_rate too high, or kl_coef too low.",
    ),
    "policy/entropy_avg": (
        "It collapses onto few answers: learning_rate too high, kl_coef too low.",
        "It answers at random: learning_rate too high, another temperature, or a reward of the wrong sign.",
    ),
    "policy/approxkl_avg": (
        "Its steps are small: learning_rate too low, or advantages that are all alike.",
        "Its steps are large: learning_rate or ppo_epochs too high.",
    ),
    "response/length": (
        "Responses shrink: the reward pays for it, or EOS comes at once.",
        "Responses grow: EOS is masked or not learnt, or the reward pays for length.",
    ),
    "response/truncated": ("", "Responses do not end: EOS is masked or not learnt."),
    "val/explained_variance": (
        "The value network does not follow the returns: value_learning_rate, or a reward that jumps.",
        "Returns are easier to tell: scores that hardly vary.",
    ),
    "loss/value_avg": (
        "Returns hardly vary: scores that are all alike, or another scale.",
        "Returns are far from what the value network expects: scores of another scale, or a policy that jumps.",
    ),
}


def _kl(record: Record) -> tuple[float | None, float | None]:
    """KL a response and tokens a response, as they were evaluated, else as they were logged at the end."""
    kl = (record.result.get("kl") or {}).get("ppo_vs_sft")
    if kl is not None:
        return kl, record.model("ppo").get("length")
    names = ("objective/kl", "response/length")
    logged = [ends(record.curves["ppo"], name) or (None, None) for name in names]
    return logged[0][1], logged[1][1]


def verdict(record: Record, verdict: Verdict) -> None:
    """Score, judge, drift, answers, and what rang while it ran."""
    curve = record.curves["ppo"]
    if (scores := ends(curve, "objective/scores")) and len(curve) > 1:
        verdict.grade(
            scores[1] > scores[0],
            f"The score it optimises went from {scores[0]:.3f} to {scores[1]:.3f} (bad unless it rises).",
        )
    if versus := record.comparison("ppo_vs_sft"):
        verdict.wins(versus, "SFT")
        by_rm = record.comparison("ppo_vs_sft_by_rm")
        if by_rm and by_rm["rate"] > 0.5 and versus["high"] < 0.5:
            verdict.add(
                "bad",
                f"Over-optimised: the reward model prefers it in {by_rm['rate']:.0%} of prompts, the "
                f"judge in {versus['rate']:.0%}. Raise kl_coef, or mend the reward model.",
            )
        _groups(verdict, versus)
    kl, length, limit = *_kl(record), record.limits.kl_per_token
    if kl is not None and length:
        each = f"{kl / length:.2f} a token (watch above {limit:.3g})"
        text = f"KL to SFT is {kl:.2f} nats per response, {each}."
        verdict.grade(kl / length <= limit, text, "watch")
    _answers(record, verdict)
    _alarms(record, verdict)
    _optimisation(curve, verdict)


def _groups(verdict: Verdict, versus: dict) -> None:
    """Kinds of prompts that got worse though the whole may have got better."""
    for key, members in (versus.get("groups") or {}).items():
        for value, rate in members.items():
            if rate["high"] < 0.5:
                told = f"wins only {rate['rate']:.0%} against SFT, worse than even."
                verdict.add("watch", f"{key} {value}: {told}")


def _answers(record: Record, verdict: Verdict) -> None:
    ppo, sft = record.model("ppo"), record.model("sft")
    if "ended" in ppo:
        verdict.ended(ppo["ended"], record.bars.eos_share)
    if "length" in ppo and sft.get("length"):
        ratio, limit = ppo["length"] / sft["length"], record.limits.length
        verdict.grade(
            1 / limit <= ratio <= limit,
            f"Responses are {ratio:.2f} times as long as SFT's (watch beyond {limit:.3g}, either way).",
            "watch",
        )


def _alarms(record: Record, verdict: Verdict) -> None:
    """What rang while it ran, and when that began."""
    curve, limits = record.curves["ppo"], record.limits
    rings = [(row["step"], alarms.ringing(row["step"], row, curve[0], limits)) for row in curve]
    for name, meaning in alarms.meanings(limits).items():
        rang = [step for step, found in rings if found[name]]
        if rang:
            until = "on" if rang[-1] == curve[-1]["step"] else f"to {rang[-1]:.0f}"
            verdict.add("watch", f"Alarm from iteration {rang[0]:.0f} {until}: {meaning}.")


def _optimisation(curve: list[dict], verdict: Verdict) -> None:
    """Health of the update itself; sentences only about what is not healthy."""
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
