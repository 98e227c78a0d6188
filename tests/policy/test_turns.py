"""Credit over the turns of an episode, and an update of episodes: hand-worked numbers, and the
model's own forward with its gradient by torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from conf.choices import Advantage, Aggregation, KLEstimator, KLPlace, Scheduler
from conf.reward import TurnCredit
from conf.stages import OnlineStage
from policy import prepare as preparing
from policy.advantages import (
    discounted_over_turns,
    gae,
    group_advantages,
    group_turn_advantages,
    of_turns,
    rewards_to_go,
    token_rewards,
    turn_gamma,
    turn_returns,
)
from policy.batching import collate
from policy.engines.base import OptimSettings
from policy.engines.torch import TorchEngine
from policy.forward import Layout, Models, policy_logprobs
from policy.model import PolicyModule
from policy.prepare import TrainBatch, advantages_without_critic, prepare
from policy.update import update

NAN = float("nan")
# Two turns of two tokens and of one, between them two tokens of the environment; then one turn.
MASK = torch.tensor([[True, True, False, False, True], [True, True, True, False, False]])
TURNS = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])


# ---- rewards and discounts ----


def test_rewards_of_turns_stand_at_their_ends_and_the_rest_at_the_last_token() -> None:
    kl = torch.tensor([[1.0, 0.0, NAN, NAN, 2.0], [0.0, 0.0, 0.0, NAN, NAN]])
    # the environment gave 2 and 3, a term beside it 1; the second row 4 and -1
    placed = torch.tensor([[0.0, 2.0, 0.0, 0.0, 3.0], [0.0, 0.0, 4.0, 0.0, 0.0]])
    rewards = token_rewards(torch.tensor([6.0, 3.0]), kl, MASK, 0.5, placed)
    assert rewards.tolist() == [[-0.5, 2.0, 0.0, 0.0, 3.0 + 1.0 - 1.0], [0.0, 0.0, 3.0, 0.0, 0.0]]
    whole = token_rewards(torch.tensor([6.0, 3.0]), kl, MASK, 0.5)
    assert whole.tolist() == [[-0.5, 0.0, 0.0, 0.0, 5.0], [0.0, 0.0, 3.0, 0.0, 0.0]]


def test_the_discount_of_a_turn_stands_where_it_ends() -> None:
    steps = turn_gamma(0.5, 0.8, TURNS, MASK)
    assert isinstance(steps, torch.Tensor)
    expected = torch.tensor([[0.5, 0.4, 0.5, 0.5, 0.4], [0.5, 0.5, 0.4, 0.5, 0.5]])
    torch.testing.assert_close(steps, expected)
    # turns that follow each other at once end too
    beside = turn_gamma(1.0, 0.5, torch.tensor([[0, 0, 1]]), torch.ones(1, 3, dtype=torch.bool))
    assert isinstance(beside, torch.Tensor)
    assert beside.tolist() == [[1.0, 0.5, 0.5]]
    assert turn_gamma(0.5, 1.0, TURNS, MASK) == turn_gamma(0.5, 0.8, None, MASK) == 0.5


def test_gae_over_turns_hand_computed() -> None:
    rewards = torch.tensor([[0.0, 1.0, NAN, NAN, 2.0]])
    values = torch.tensor([[0.5, 2.0, NAN, NAN, 3.0]])
    gamma = turn_gamma(0.5, 0.8, TURNS[:1], MASK[:1])
    advantages, returns = gae(rewards, values, MASK[:1], gamma=gamma, gae_lambda=0.5)
    # last: 2 - 3 = -1; before: 1 + 0.4 * 3 - 2 + 0.4 * 0.5 * -1 = 0; first: 0.5 * 2 - 0.5 = 0.5
    torch.testing.assert_close(advantages, torch.tensor([[0.5, 0.0, 0.0, 0.0, -1.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.0, 2.0, 0.0, 0.0, 2.0]]))


def test_rewards_to_go_over_turns_hand_computed() -> None:
    rewards = torch.tensor([[1.0, 2.0, NAN, NAN, 8.0], [0.0, 0.0, 4.0, NAN, NAN]])
    gamma = turn_gamma(1.0, 0.5, TURNS, MASK)
    to_go = rewards_to_go(rewards, MASK, gamma=gamma)
    assert to_go.tolist() == [[7.0, 6.0, 0.0, 0.0, 8.0], [4.0, 4.0, 4.0, 0.0, 0.0]]


def test_returns_of_turns_hand_computed() -> None:
    rewards = torch.tensor([[1.0, 2.0, NAN, NAN, 8.0], [0.0, 1.0, 4.0, NAN, NAN]])
    returns = turn_returns(rewards, TURNS, MASK, 0.5)
    # 1 + 2 + 0.5 * 8, then 8; the second row's one turn, repeated
    assert returns.tolist() == [[7.0, 8.0], [5.0, 5.0]]
    spread = of_turns(returns, TURNS, MASK)
    assert spread.tolist() == [[7.0, 7.0, 0.0, 0.0, 8.0], [5.0, 5.0, 5.0, 0.0, 0.0]]


def test_an_advantage_is_discounted_by_the_turns_that_come_after() -> None:
    found = discounted_over_turns(torch.tensor([4.0, -2.0]), TURNS, MASK, 0.5)
    assert found.tolist() == [[2.0, 2.0, 0.0, 0.0, 4.0], [-2.0, -2.0, -2.0, 0.0, 0.0]]


# ---- turns against the group's ----


def test_turns_of_a_group_are_compared_turn_by_turn() -> None:
    groups = torch.zeros(2, dtype=torch.long)
    # the first gains in turn 0 and the second in turn 1: they differ in what is still to come
    returns = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    plain = group_turn_advantages(returns, groups, std=False)
    assert plain.tolist() == [[0.0, -0.5], [0.0, 0.5]]
    # the standard deviations are 0 and 1 / sqrt(2): the larger one counts
    divided = group_turn_advantages(returns, groups, std=True)
    torch.testing.assert_close(divided, torch.tensor([[0.0, -(0.5**0.5)], [0.0, 0.5**0.5]]))


def test_one_turn_is_compared_as_a_response_is() -> None:
    scores, groups = torch.randn(8), torch.arange(8) % 2
    for std in (False, True):
        ours = group_turn_advantages(scores[:, None], groups, std=std)
        assert torch.equal(ours[:, 0], group_advantages(scores, groups, std=std))


def stage_of(**options: Any) -> OnlineStage:
    given: dict[str, Any] = {
        "advantage": Advantage.group,
        "advantage_std": False,
        "samples_per_prompt": 2,
    }
    return OnlineStage(**given | options)


def advantages_of(
    stage: OnlineStage, rewards: torch.Tensor, baselines: torch.Tensor | None = None
) -> list[list[float]]:
    """Of two episodes of one group, of two turns and of one."""
    groups, scores = torch.zeros(2, dtype=torch.long), rewards.sum(dim=1)
    found = advantages_without_critic(rewards, scores, groups, baselines, MASK, stage, TURNS)
    return found.tolist()


AT_THE_END = torch.tensor([[0.0, 0.0, 0.0, 0.0, 3.0], [0.0, 0.0, 1.0, 0.0, 0.0]])
BY_TURNS = torch.tensor([[0.0, 2.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0, 0.0]])
EPISODE, TURN = TurnCredit.episode, TurnCredit.turn


@pytest.mark.parametrize(
    ("stage", "rewards", "baselines", "expected"),
    [
        # 3 and 1 against their mean 2; one turn comes after the first
        (stage_of(turn_discount=0.5), AT_THE_END, None, [[0.5, 0.5, 0, 0, 1], [-1, -1, -1, 0, 0]]),
        # the same sum, wherever it stands
        (stage_of(turn_discount=0.5), BY_TURNS, None, [[0.5, 0.5, 0, 0, 1], [-1, -1, -1, 0, 0]]),
        # 2 + 0.5 and 1, then 1 against how the other ended, 1
        (
            stage_of(turn_credit=TURN, turn_discount=0.5),
            BY_TURNS,
            None,
            [[0.75, 0.75, 0, 0, 0], [-0.75, -0.75, -0.75, 0, 0]],
        ),
        (stage_of(turn_credit=TURN), AT_THE_END, None, [[1, 1, 0, 0, 1], [-1, -1, -1, 0, 0]]),
        # against the others, so twice as much in a group of two
        (
            stage_of(advantage=Advantage.leave_one_out, turn_credit=TURN),
            BY_TURNS,
            None,
            [[2, 2, 0, 0, 0], [-2, -2, -2, 0, 0]],
        ),
        # to go: 2 + 0.5, 1 and 1; the mean score 2 from the last token on: 1 and 2, and 2
        (
            stage_of(advantage=Advantage.reinforce_pp, group_baseline=True, turn_discount=0.5),
            BY_TURNS,
            None,
            [[1.5, 1.5, 0, 0, -1], [-1, -1, -1, 0, 0]],
        ),
        # against greedy episodes that scored 4 and 1
        (
            stage_of(advantage=Advantage.greedy, turn_discount=0.5),
            AT_THE_END,
            torch.tensor([4.0, 1.0]),
            [[-0.5, -0.5, 0, 0, -1], [0, 0, 0, 0, 0]],
        ),
    ],
)
def test_estimators_without_a_critic_hand_computed(
    stage: OnlineStage,
    rewards: torch.Tensor,
    baselines: torch.Tensor | None,
    expected: list[list[float]],
) -> None:
    assert advantages_of(stage, rewards, baselines) == expected


@pytest.mark.parametrize("credit", [EPISODE, TURN])
@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_episodes_that_are_the_same_teach_nothing(credit: TurnCredit, discount: float) -> None:
    rewards, mask = BY_TURNS[:1].repeat(3, 1), MASK[:1].repeat(3, 1)
    stage = stage_of(turn_credit=credit, turn_discount=discount, advantage_std=True)
    groups = torch.zeros(3, dtype=torch.long)
    turns = TURNS[:1].repeat(3, 1)
    found = advantages_without_critic(rewards, rewards.sum(1), groups, None, mask, stage, turns)
    assert not found.any()


ESTIMATORS = [Advantage.group, Advantage.leave_one_out, Advantage.reinforce_pp, Advantage.greedy]


@pytest.mark.parametrize("advantage", ESTIMATORS)
@pytest.mark.parametrize("credit", [EPISODE, TURN])
@given(st.integers(0, 2**20), st.floats(0.1, 1.0))
def test_of_one_turn_each_nothing_changes(
    advantage: Advantage, credit: TurnCredit, seed: int, discount: float
) -> None:
    """To the bit: with rewards at the end, where responses of one turn have them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (6,), generator=generator)
    mask = torch.arange(5) < lengths[:, None]
    scores, groups = torch.randn(6, generator=generator), torch.arange(6) % 2
    baselines = torch.randn(6, generator=generator)
    rewards = token_rewards(scores, torch.zeros(6, 5), mask, 0.0)
    stage = stage_of(advantage=advantage, advantage_std=True, gamma=0.9)
    turned = replace(stage, turn_credit=credit, turn_discount=discount)
    rest = (rewards, scores, groups, baselines, mask)
    plain = advantages_without_critic(*rest, stage, None)
    first_turn = torch.zeros(mask.shape, dtype=torch.long)
    assert torch.equal(advantages_without_critic(*rest, turned, first_turn), plain)


# ---- what a stage's options make of a batch ----


def test_a_critics_advantages_follow_credit_and_discount(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of GAE above, from scores and the environment's rewards."""
    values = torch.tensor([[0.5, 2.0, 0.0, 0.0, 3.0]])
    monkeypatch.setattr(preparing, "critic_values", lambda *_: values)
    batch = TrainBatch(
        tokens=collate([[5, 6]], [[7] * 5], 0, written=MASK[:1].tolist()),
        keep=torch.ones(1, dtype=torch.bool),
        groups=torch.zeros(1, dtype=torch.long),
        pairs=[],
        rollout_logprobs=torch.zeros(1, 5),
        turns=TURNS[:1],
    )
    placed = replace(batch, turn_rewards=torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.5]]))
    stage = OnlineStage(
        gamma=0.5, gae_lambda=0.5, turn_discount=0.8, kl_coef=0.0, whiten_advantages=False
    )
    models = Models(None, object(), None, Layout(100))
    found = [
        prepare(given, torch.tensor([3.0]), None, models, stage, kl_coef=0.0, passes=False)
        for given in (placed, batch)
    ]
    assert found[0].rewards.tolist() == [[0.0, 1.0, 0.0, 0.0, 2.0]]
    torch.testing.assert_close(found[0].advantages, torch.tensor([[0.5, 0.0, 0.0, 0.0, -1.0]]))
    assert found[1].rewards.tolist() == [[0.0, 0.0, 0.0, 0.0, 3.0]]
    # last: 3 - 3 = 0; before: 0.4 * 3 - 2 = -0.8; first: 0.5 * 2 - 0.5 + 0.25 * -0.8 = 0.3
    torch.testing.assert_close(found[1].advantages, torch.tensor([[0.3, -0.8, 0.0, 0.0, 0.0]]))


# ---- an update of episodes ----

PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9]]
RESPONSES = [[10, 11, 20, 21, 12, 13], [14, 15, 16], [17, 22, 23, 24, 18, 25, 19]]
WRITTEN = [
    [True, True, False, False, True, True],
    [True, True, True],
    [True, False, False, False, True, False, True],
]
EPISODE_TURNS = [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 2]]
OPTIM = OptimSettings(
    learning_rate=0.0,
    weight_decay=0.0,
    betas=(0.9, 0.999),
    eps=1e-8,
    max_grad_norm=0.0,
    scheduler=Scheduler.constant,
    warmup_steps=0,
    total_steps=10,
)


def own_logprobs(model: Any, row: int) -> torch.Tensor:
    """Of the tokens that the policy wrote in this row, by the model's own forward of it alone."""
    prompt, response = PROMPTS[row], RESPONSES[row]
    ids = torch.tensor([[*prompt, *response]])
    log_p = torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
    places = [i for i, own in enumerate(WRITTEN[row]) if own]
    return torch.stack([log_p[len(prompt) + i - 1, response[i]] for i in places])


LAYOUTS = [
    Layout(10_000),
    Layout(12),
    Layout(10_000, shared=True, hidden_size=64),
    Layout(16, shared=True, hidden_size=64),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_of_episodes_are_those_of_the_models_own_forward(
    tiny_model: Callable[..., Path], layout: Layout
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    batch = collate(PROMPTS, RESPONSES, 0, written=WRITTEN)
    groups = torch.tensor([0, 0, 1])
    found, _ = policy_logprobs(PolicyModule(model, chunk=4), batch, groups, [0, 1, 2], layout)
    with torch.no_grad():
        expected = [own_logprobs(model, row) for row in range(3)]
    for row in range(3):
        own = found[row][batch.response_mask[row]]
        torch.testing.assert_close(own, expected[row], rtol=0, atol=1e-5)
    assert not found[~batch.response_mask].any()


SCORES = torch.tensor([1.0, -1.0, 0.5])


def episodes() -> TrainBatch:
    tokens = collate(PROMPTS, RESPONSES, 0, written=WRITTEN)
    return TrainBatch(
        tokens=tokens,
        keep=torch.ones(3, dtype=torch.bool),
        groups=torch.tensor([0, 0, 1]),
        pairs=[],
        rollout_logprobs=torch.zeros(tokens.response_mask.shape),
        turns=torch.tensor(EPISODE_TURNS),
    )


def gradient_of_update(stage: OnlineStage, model: Any, reference: Any, layout: Layout) -> Any:
    """The gradient that one optimizer step of `stage` takes, by parameter."""
    engine = TorchEngine(PolicyModule(model, chunk=4), OPTIM, torch.device("cpu"))
    engine.module.entropy_grad = True
    models = Models(engine, None, PolicyModule(reference, chunk=4), layout)
    taken = {}

    def keep(*_: object) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                taken[name] = parameter.grad.clone()

    engine.optimizer.register_step_pre_hook(keep)
    batch = prepare(episodes(), SCORES, None, models, stage, kl_coef=0.1, passes=True)
    update(batch, models, stage, kl_coef=0.1, constant_length=8, seed=0)
    return taken


def loss_by_hand(model: Any, reference: Any, aggregation: Aggregation) -> torch.Tensor:
    """REINFORCE with a discount of 0.5 over turns, KL (k2) and entropy, of written tokens."""
    shares = [torch.tensor([0.5, 0.5, 1, 1]), torch.ones(3), torch.tensor([0.25, 0.5, 1])]
    terms = []
    for row, share in enumerate(shares):
        new = own_logprobs(model, row)
        with torch.no_grad():
            ref = own_logprobs(reference, row)
        surrogate = SCORES[row] * share * torch.exp(new - new.detach())
        loss = -surrogate + 0.1 * 0.5 * (ref - new).square()
        weight = 1 / len(new) / 3 if aggregation is Aggregation.sequence else 1 / 10
        terms.append(weight * loss.sum() - 0.01 * own_entropy(model, row).sum() / 10)
    return torch.stack(terms).sum()


def own_entropy(model: Any, row: int) -> torch.Tensor:
    prompt, response = PROMPTS[row], RESPONSES[row]
    log_p = torch.log_softmax(model(input_ids=torch.tensor([[*prompt, *response]])).logits[0], -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    places = [i for i, own in enumerate(WRITTEN[row]) if own]
    return torch.stack([entropy[len(prompt) + i - 1] for i in places])


def models_of(folder: Path) -> tuple[Any, Any]:
    """A policy, and a reference whose weights are others."""
    loaded: Sequence[Any] = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loaded[1].parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return loaded[0], loaded[1]


@pytest.mark.parametrize("aggregation", [Aggregation.token, Aggregation.sequence])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_that_of_written_tokens_alone(
    tiny_model: Callable[..., Path], layout: Layout, aggregation: Aggregation
) -> None:
    """A loss on what the environment wrote gives another, as does a turn that is off by one."""
    stage = OnlineStage(
        advantage=Advantage.reinforce_pp,
        turn_discount=0.5,
        whiten_advantages=False,
        aggregation=aggregation,
        kl_coef=0.1,
        kl_place=KLPlace.loss,
        kl_loss_estimator=KLEstimator.k2,
        entropy_coef=0.01,
        epochs=1,
        prompts_per_step=3,
    )
    policy, reference = models_of(tiny_model())
    taken = gradient_of_update(stage, policy, reference, layout)
    policy.zero_grad()
    loss_by_hand(policy, reference, aggregation).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(taken[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
