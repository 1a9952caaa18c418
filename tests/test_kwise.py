"""The K-wise loss against numbers worked by hand."""

import math

import pytest
import torch

import tiny_models
from pipeline.training.kwise import KwiseCollator, kwise_loss


def softplus(x):
    return math.log1p(math.exp(x))


def test_one_prompt_is_the_mean_over_its_untied_pairs():
    scores, ranks = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1, 2, 2])
    loss, better = kwise_loss(scores, ranks, torch.zeros(3, dtype=torch.long))
    assert loss.item() == pytest.approx((softplus(-1) + softplus(-2)) / 2, abs=1e-6)
    assert better.tolist() == [[False, True, True], [False, False, False], [False, False, False]]


def test_every_prompt_counts_once_however_many_pairs_it_has():
    scores = torch.tensor([0.0, 1.0, 3.0, 2.0, 1.0, 0.0])
    ranks = torch.tensor([1, 2, 1, 2, 3, 4])
    loss, better = kwise_loss(scores, ranks, torch.tensor([0, 0, 1, 1, 1, 1]))
    second = (3 * softplus(-1) + 2 * softplus(-2) + softplus(-3)) / 6
    assert loss.item() == pytest.approx((softplus(1) + second) / 2, abs=1e-6)
    assert better.sum() == 7


def test_a_prompt_of_ties_gives_nothing_and_divides_nothing():
    scores = torch.tensor([0.0, 1.0, 5.0, 7.0], requires_grad=True)
    loss, _ = kwise_loss(scores, torch.tensor([1, 2, 3, 3]), torch.tensor([0, 0, 1, 1]))
    assert loss.item() == pytest.approx(softplus(1), abs=1e-6)
    loss, better = kwise_loss(scores, torch.tensor([1, 1, 1, 1]), torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss == 0 and not better.any() and (scores.grad == 0).all()


def test_the_gradient_is_that_of_separate_prompts():
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(9, generator=g, dtype=torch.float64, requires_grad=True)
    ranks, groups = (
        torch.tensor([1, 2, 3, 4, 2, 1, 1, 1, 2]),
        torch.tensor([0] * 4 + [1] * 2 + [2] * 3),
    )
    together = torch.autograd.grad(kwise_loss(scores, ranks, groups)[0], scores)[0]
    apart = sum(
        torch.autograd.grad(
            kwise_loss(scores[groups == i], ranks[groups == i], groups[groups == i])[0], scores
        )[0]
        for i in range(3)
    )
    torch.testing.assert_close(together, apart / 3)


def test_soft_labels_are_the_cross_entropy_with_what_is_believed():
    scores, ranks = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1, 2, 2])
    strengths = torch.tensor([math.log(3.0), 0.0, math.log(9.0)])  # p = 3/4 and 1/4
    one = torch.zeros(3, dtype=torch.long)
    loss, better = kwise_loss(scores, ranks, one, strengths=strengths)
    by_hand = (
        0.75 * softplus(-1) + 0.25 * softplus(1) + 0.25 * softplus(-2) + 0.75 * softplus(2)
    ) / 2
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)
    sure, _ = kwise_loss(scores, ranks, one, strengths=torch.tensor([60.0, 0.0, 0.0]))
    assert sure.item() == pytest.approx(kwise_loss(scores, ranks, one)[0].item(), abs=1e-6)
    assert better.sum() == 2


def test_a_margin_is_asked_for_each_place_apart():
    scores, ranks = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1, 2, 3])
    loss, _ = kwise_loss(scores, ranks, torch.zeros(3, dtype=torch.long), margin=0.5)
    by_hand = (2 * softplus(-0.5) + softplus(-1.0)) / 3  # 1 - .5 twice, 2 - 1 once
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)


def test_collator_flattens_prompts_of_different_k():
    rows = [
        {"prompt": [1], "responses": [[2, 3], [4]], "ranks": [1, 2]},
        {"prompt": [3, 4], "responses": [[5, 6], [7, 8], [9]], "ranks": [2, 1, 2]},
    ]
    batch = KwiseCollator(pad_token_id=0)(rows)
    assert batch["queries"].tolist() == [[0, 1], [0, 1], [3, 4], [3, 4], [3, 4]]
    assert batch["query_mask"].sum(1).tolist() == [1, 1, 2, 2, 2]
    assert batch["responses"].tolist() == [[2, 3], [4, 0], [5, 6], [7, 8], [9, 0]]
    assert batch["response_mask"].sum(1).tolist() == [2, 1, 2, 2, 1]
    assert batch["ranks"].tolist() == [1, 2, 2, 1, 2]
    assert batch["groups"].tolist() == [0, 0, 1, 1, 1]


def test_a_model_that_scores_everything_alike_has_half_of_the_pairs_right(tmp_path):
    from datasets import Dataset
    from trl import RewardConfig

    from stages.rm import KwiseTrainer

    model, tokenizer = tiny_models.reward(), tiny_models.tokenizer()
    model.score.weight.data.zero_()
    rows = [{"prompt": [2, 6, 3], "responses": [[9], [10], [11]], "ranks": [1, 2, 3]}]
    trainer = KwiseTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            remove_unused_columns=False,
        ),
        data_collator=KwiseCollator(0),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    (batch,), _ = trainer.get_batch_samples(iter([KwiseCollator(0)(rows)]), 1, model.device)
    trainer.compute_loss(model.train(), batch)
    assert trainer._metrics["train"]["accuracy"] == [0.5]
