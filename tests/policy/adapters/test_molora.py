"""Mixtures of low-rank experts against a forward pass written by hand; their router learns."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from conf.adapters import AdapterConfig, facts_of
from conf.choices import AdapterKind, Carrier
from conf.methods import MoLoraConfig
from policy.adapters import attach, method_of
from policy.saving import save_adapter
from rlhf.models.inserted import ExpertsInsert
from rlhf.types import UserError

IDS = torch.arange(24).view(2, 12)
EXPERTS, RANK = 3, 4
ADAPTER = AdapterConfig(
    kind=AdapterKind.molora, rank=RANK, alpha=16.0, molora=MoLoraConfig(experts=EXPERTS)
)


@pytest.fixture
def base(tiny_model: Callable[..., Path]) -> Callable[[], Any]:
    return lambda: AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()


def move(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():
        if param.requires_grad:
            param.data.add_(0.1 * torch.randn(param.shape, generator=generator))
    return model.eval()


def experts_of(adapted: Any) -> dict[str, ExpertsInsert]:
    """By the path of the linear layer."""
    found = {}
    for name, module in adapted.named_modules():
        if isinstance(module, ExpertsInsert):
            found[name.split(".molora_inserts")[0]] = module
    return found


def test_a_forward_pass_by_hand(base: Callable[[], Any]) -> None:
    """Each linear layer of a plain model gives y + alpha/r sum_e softmax(R x)_e B_e A_e x."""
    adapted = move(attach(base(), ADAPTER, task="CAUSAL_LM")).double()
    plain, experts = base().double(), experts_of(adapted)

    def hook(path: str) -> Any:
        insert = experts[f"base_model.model.{path}"]

        def changed(layer: Any, read: tuple[Tensor], gave: Tensor) -> Tensor:
            (x,) = read
            shares = (x @ insert.router.weight.T).softmax(-1)
            total = torch.zeros_like(gave)
            for number in range(EXPERTS):
                rows = slice(number * RANK, (number + 1) * RANK)
                a, b = insert.a.weight[rows], insert.b.weight[:, rows]
                total = total + shares[..., number, None] * (x @ a.T @ b.T)
            return gave + 16.0 / RANK * total

        return changed

    with torch.no_grad():
        start = plain(IDS).logits
        for name, module in plain.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.register_forward_hook(hook(name))
        expected, found = plain(IDS).logits, adapted(IDS).logits
    assert len(experts) == 2 * 7
    assert float((found - start).abs().max()) > 1e-2
    assert float((found - expected).abs().max()) < 1e-12


def test_it_starts_as_the_base_and_trains_what_the_formula_says(base: Callable[[], Any]) -> None:
    """A and R ~ N(0, 0.02), B = 0."""
    adapted = attach(base(), ADAPTER, task="CAUSAL_LM").eval()
    count = sum(param.numel() for param in adapted.parameters() if param.requires_grad)
    sizes = [(64, 64)] * 4 + [(64, 96)] * 2 + [(96, 64)]  # (in, out) of a block's linear layers
    each = [EXPERTS * (RANK * (n_in + out) + n_in) for n_in, out in sizes]
    assert count == 2 * sum(each) == method_of(ADAPTER).expected(base(), ADAPTER)
    fresh = list(experts_of(adapted).values())
    assert not any(bool(insert.b.weight.any()) for insert in fresh)
    for weights in ([i.a.weight for i in fresh], [i.router.weight for i in fresh]):
        numbers = torch.cat([weight.detach().flatten() for weight in weights])
        assert float(numbers.std()) == pytest.approx(0.02, rel=0.1)
    with torch.no_grad():
        start = base()(IDS).logits
        assert torch.equal(adapted(IDS).logits, start)
        move(adapted)
        assert not torch.equal(adapted(IDS).logits, start)
        with adapted.disable_adapter():
            assert torch.equal(adapted(IDS).logits, start)


def test_the_router_computes_in_float32() -> None:
    """In bfloat16 these scores, 2e-3 apart, would be one."""
    torch.manual_seed(0)
    insert = ExpertsInsert(4, 4, experts=2, rank=1, alpha=1.0, dropout=0.0).bfloat16()
    insert.router.weight.data = torch.tensor([[1.0, 0.002, 0, 0], [1.0, 0, 0, 0]]).bfloat16()
    shares = insert.router(torch.ones(1, 4).bfloat16()).detach()
    assert shares.dtype is torch.float32
    assert float(shares[0, 0] - shares[0, 1]) == pytest.approx(1e-3, rel=0.05)


def test_saved_and_loaded_to_the_bit(base: Callable[[], Any], tmp_path: Path) -> None:
    from peft import PeftModel

    adapted = move(attach(base(), ADAPTER, task="CAUSAL_LM"))
    save_adapter(adapted, tmp_path / "ours")
    adapted.save_pretrained(tmp_path / "pefts")
    with torch.no_grad():
        expected = adapted(IDS).logits
        for place in ("ours", "pefts"):
            again = PeftModel.from_pretrained(base(), str(tmp_path / place)).eval()
            assert torch.equal(again(IDS).logits, expected)
    with pytest.raises(UserError, match="no weights can hold it"):
        adapted.merge_and_unload()


def test_the_router_tells_two_tasks_apart(base: Callable[[], Any]) -> None:
    """Two tasks over separate tokens: after training the shares of the experts depend on the task,
    which at the start, near 1 / E everywhere, they do not.
    """
    torch.manual_seed(3)
    adapter = replace(ADAPTER, targets=["q_proj", "up_proj"])
    adapted = attach(base(), adapter, task="CAUSAL_LM")
    first = torch.randint(10, 60, (8, 1)).repeat(1, 12)  # says its first token again and again
    second = torch.randint(100, 150, (8, 1)) + torch.arange(12)[None]  # counts up

    def difference() -> float:
        """Largest difference between the tasks' mean shares, over all layers."""
        means: dict[str, list[Tensor]] = {}
        hooks = []
        for path, insert in experts_of(adapted).items():
            keep = means.setdefault(path, [])
            hooks.append(
                insert.router.register_forward_hook(
                    lambda layer, args, out, keep=keep: keep.append(out.mean((0, 1)))
                )
            )
        with torch.no_grad():
            adapted(first)
            adapted(second)
        for handle in hooks:
            handle.remove()
        return max(float((one - other).abs().max()) for one, other in means.values())

    before = difference()
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=3e-2)
    losses = []
    for _ in range(15):
        ids = torch.cat([first, second])
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
    assert before < 0.03
    assert difference() > 0.2


def test_what_can_not_be_adapted_is_refused(base: Callable[[], Any]) -> None:
    model = base()
    attention = model.model.layers[0].self_attn
    model.model.layers[1].self_attn.o_proj.weight = attention.o_proj.weight
    with pytest.raises(UserError, match=r"uses the weights of o_proj elsewhere"):
        attach(model, ADAPTER, task="CAUSAL_LM")


def test_its_way_to_generators() -> None:
    facts = facts_of(ADAPTER)
    assert (facts.carrier, facts.merges, facts.off_is_start) == (Carrier.modules, False, True)
