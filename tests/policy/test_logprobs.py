"""Chunked logprobs: values and gradients against a float64 reference, and that the full logits
never exist.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.families.build import tiny
from policy.logprobs import has_plain_head, selected_logprobs

# H below every chunk size used to look for [n, V], so that no gradient of the head looks like
# logits
N, H, V = 23, 4, 50


def case(seed: int = 0) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(N, H, requires_grad=True), nn.Linear(H, V), torch.randint(V, (N,))


def reference(
    hidden: Tensor, head: nn.Linear, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """float64, all at once."""
    logits = (hidden.double() @ head.weight.double().T + head.bias.double()) / temperature
    p = torch.softmax(logits, dim=-1)
    return torch.log(p[torch.arange(len(labels)), labels]), torch.special.entr(p).sum(-1)


def gradients(outputs: tuple[Tensor, Tensor], hidden: Tensor, head: nn.Linear) -> list[Tensor]:
    weights = torch.linspace(-1.0, 2.0, N)
    loss = (weights * outputs[0]).sum() + 0.3 * (weights * outputs[1]).sum()
    return list(torch.autograd.grad(loss, [hidden, head.weight, head.bias]))


@pytest.mark.parametrize("chunk", [1, 5, 22, 23, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_the_float64_reference(chunk: int, temperature: float) -> None:
    hidden, head, labels = case()
    ours = selected_logprobs(hidden, head, labels, chunk=chunk, temperature=temperature)
    exact = reference(hidden, head, labels, temperature)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype is torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(
        gradients(ours, hidden, head), gradients(exact, hidden, head), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_hand_computed() -> None:
    # logits [0, ln 3]: p = [1/4, 3/4]; at temperature 1/2 they are [0, 2 ln 3]: p = [1/10, 9/10]
    hidden, head = torch.tensor([[1.0]]), nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[0.0], [1.0986122886681098]])
    logprobs, entropy = selected_logprobs(hidden, head, torch.tensor([1]), chunk=4)
    assert (logprobs.item(), entropy.item()) == pytest.approx(
        (-0.2876820724517809, 0.5623351446188083)
    )
    logprobs, entropy = selected_logprobs(hidden, head, torch.tensor([0]), chunk=4, temperature=0.5)
    assert (logprobs.item(), entropy.item()) == pytest.approx(
        (-2.302585092994046, 0.3250829733914482)
    )


def test_uniform_logits_have_the_entropy_of_the_vocabulary() -> None:
    logprobs, entropy = selected_logprobs(
        torch.zeros(3, H), nn.Linear(H, V, bias=False), torch.arange(3), chunk=2
    )
    torch.testing.assert_close(entropy, torch.full((3,), V, dtype=torch.float32).log())
    torch.testing.assert_close(logprobs, -entropy)


def test_row_order_changes_nothing() -> None:
    hidden, head, labels = case()
    order = torch.randperm(N)
    plain, shuffled = (
        selected_logprobs(hidden[o], head, labels[o], chunk=5) for o in (torch.arange(N), order)
    )
    for a, b in zip(plain, shuffled, strict=True):
        torch.testing.assert_close(a[order], b)


def test_half_precision_logits_are_normalised_in_float32() -> None:
    hidden, head, labels = case()
    hidden, head = hidden.detach().bfloat16(), head.bfloat16()
    logprobs, entropy = selected_logprobs(hidden, head, labels, chunk=5)
    logits = head(hidden).double()
    assert (logprobs.dtype, entropy.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(
        logprobs.double(),
        torch.log_softmax(logits, -1)[torch.arange(N), labels],
        rtol=1e-5,
        atol=1e-5,
    )


def test_no_rows_give_no_results_but_reach_the_head() -> None:
    head = nn.Linear(H, V)
    logprobs, entropy = selected_logprobs(
        torch.zeros(0, H), head, torch.zeros(0, dtype=torch.long), chunk=5
    )
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


@pytest.mark.parametrize(
    ("rows", "chunk", "sizes"), [(23, 10, [10, 10, 3]), (23, 23, [23]), (0, 5, [0])]
)
def test_the_head_is_called_once_per_chunk(rows: int, chunk: int, sizes: list[int]) -> None:
    """Ranks with equally many rows call it equally often, which ZeRO-3 needs."""
    hidden, head, labels = case()
    calls: list[int] = []
    head.register_forward_hook(lambda _module, args, _output: calls.append(len(args[0])))
    selected_logprobs(hidden[:rows], head, labels[:rows], chunk=chunk)
    assert calls == sizes


class LiveVocabularyRows(TorchDispatchMode):
    """The most rows of [n, V] that any one operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.dim() == 2 and leaf.shape[1] == V:
                self.most = max(self.most, leaf.shape[0])
        return out


@contextmanager
def saved_vocabulary_rows() -> Iterator[list[int]]:
    """Rows of every [n, V] tensor that autograd keeps for backward."""
    rows: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 2 and tensor.shape[1] == V:
            rows.append(tensor.shape[0])
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield rows


@pytest.mark.parametrize("entropy_grad", [True, False])
def test_the_full_logits_never_exist(entropy_grad: bool) -> None:
    hidden, head, labels = case()
    with LiveVocabularyRows() as live, saved_vocabulary_rows() as saved:
        outputs = selected_logprobs(hidden, head, labels, chunk=5, entropy_grad=entropy_grad)
        assert saved == []  # several chunks: backward computes each anew
        outputs[0].sum().backward()
    assert 0 < live.most <= 5


def test_one_chunk_is_kept_rather_than_computed_twice() -> None:
    hidden, head, labels = case()
    calls: list[object] = []
    head.register_forward_hook(lambda *_: calls.append(1))
    with saved_vocabulary_rows() as saved:
        gradients(selected_logprobs(hidden, head, labels, chunk=N), hidden, head)
    assert N in saved
    assert len(calls) == 1


def test_nothing_is_kept_without_gradients() -> None:
    hidden, head, labels = case()
    with saved_vocabulary_rows() as saved, torch.no_grad():
        logprobs, entropy = selected_logprobs(hidden, head, labels, chunk=5)
    assert saved == []
    assert not logprobs.requires_grad
    assert not entropy.requires_grad


@pytest.mark.parametrize(
    ("hidden", "labels", "options"),
    [
        ((2, 3, H), (2, 3), {"chunk": 4}),
        ((4, H), (3,), {"chunk": 4}),
        ((4, H), (4,), {"chunk": 0}),
        ((4, H), (4,), {"chunk": 4, "temperature": 0.0}),
    ],
)
def test_bad_arguments_rise(
    hidden: tuple[int, ...], labels: tuple[int, ...], options: dict
) -> None:
    with pytest.raises(ValueError, match="expected"):
        selected_logprobs(
            torch.zeros(hidden), nn.Linear(H, V), torch.zeros(labels, dtype=torch.long), **options
        )


@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_without_an_entropy_gradient_values_and_the_logprobs_gradient_stay_exact(
    chunk: int, temperature: float
) -> None:
    hidden, head, labels = case()
    ours = selected_logprobs(
        hidden, head, labels, chunk=chunk, temperature=temperature, entropy_grad=False
    )
    exact = reference(hidden, head, labels, temperature)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)
    assert not ours[1].requires_grad
    weights = torch.linspace(-1.0, 2.0, N)
    found, expected = (
        torch.autograd.grad((weights * o[0]).sum(), [hidden, head.weight, head.bias])
        for o in (ours, exact)
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_second_backward_through_the_reused_buffer_is_refused() -> None:
    hidden, head, labels = case()
    logprobs, _ = selected_logprobs(hidden, head, labels, chunk=1000, entropy_grad=False)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


def test_no_gradient_at_all_gives_the_same_values() -> None:
    hidden, head, labels = case()
    with torch.no_grad():
        quiet = selected_logprobs(hidden, head, labels, chunk=7, entropy_grad=False)
    for mine, theirs in zip(quiet, selected_logprobs(hidden, head, labels, chunk=7), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("entropy_grad", [True, False])
def test_a_token_of_probability_zero_adds_no_entropy(entropy_grad: bool) -> None:
    """As where a model masks part of its vocabulary: 0 log 0 is 0."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [2.0, -torch.inf, 1.0]], requires_grad=True)
    logprobs, entropy = selected_logprobs(
        logits, lambda x: x * 1.0, torch.tensor([0, 2]), chunk=8, entropy_grad=entropy_grad
    )
    alone = torch.distributions.Categorical(logits=torch.tensor([2.0, 1.0])).entropy()
    expected = torch.stack([torch.tensor(2.0).log(), alone])
    torch.testing.assert_close(entropy, expected)
    (logprobs.sum() + (entropy.sum() if entropy_grad else 0.0)).backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


def test_asking_for_a_plain_head_has_no_side_effect() -> None:
    model = tiny("granite")
    backbone = model.model
    state = torch.get_rng_state()
    assert not has_plain_head(model)
    assert model.model is backbone
    assert torch.equal(state, torch.get_rng_state())
