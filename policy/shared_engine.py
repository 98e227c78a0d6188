"""Engines of online stages whose ranks share rows (policy/sequence.py): from outside, an engine of
rows of its own.

Every rank has its own responses. The ranks of a group run one rank's micro-batch after the other,
each a part of its rows, so that no rank ever holds the activations of whole rows. A loss may need
all of a row (a response's ratio, a pair), and only its own rank can tell it, so a micro-batch is
run twice:

    call        without gradients; each rank gets the figures of its own rows, as leaves
    backward    the gradient of its loss with respect to these; then for each rank's micro-batch a
                pass with gradients, from the gradients that this rank has sent

So a step takes a forward pass more than one that holds whole rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import EngineConfig
from policy.batching import collate
from policy.forward import ADAPTER, Layout, Models, critic_values, module_of, policy_logprobs
from policy.model import CriticModule
from policy.sequence import ERRORS, Sharing, difference
from rlhf.process import distributed

Rows = list[Tensor]  # what a micro-batch's pass is given
Figures = list[Tensor]  # what it says: logprobs and entropies, or values; [B, T] each
_PROMPT, _RESPONSE = 7, 12  # tokens of the proof's row


class SharedEngine:
    """`engine`, or a frozen module, whose passes the ranks of a group run together."""

    def __init__(self, engine: Any, sharing: Sharing) -> None:
        self.inner, self.sharing = engine, sharing
        self.values = isinstance(module_of(engine), CriticModule)
        self._waiting: tuple[list[Rows], Figures] | None = None  # between a call and its backward

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("inner", "sharing", "values", "_waiting"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.inner, name, value)

    def __call__(self, *rows: Tensor) -> Any:
        """As the engine's own call on whole rows. A collective of the group."""
        everyones = [self.sharing.given(rows, giver) for giver in range(self.sharing.ranks)]
        figures: Figures = []
        with torch.no_grad():
            for giver, theirs in enumerate(everyones):
                whole = [self.sharing.total(part) for part in self._parts(theirs)]
                if giver == self.sharing.number:
                    figures = whole
        if torch.is_grad_enabled():
            figures = [one.requires_grad_() for one in figures]
            self._waiting = (everyones, figures)
        return figures[0] if self.values else tuple(figures)

    def _parts(self, rows: Rows) -> Figures:
        """The figures of this rank's tokens of `rows`, 0 at others'."""
        ids, positions = rows[0], rows[1]
        part, places = self.sharing.part(ids, 0), self.sharing.positions(ids)
        width = part.shape[1]
        own = positions // width == self.sharing.number
        local = (positions - width * self.sharing.number).clamp(0, width - 1)
        if self.values:
            return [torch.where(own, self.inner(part, local, places), 0.0)]
        response_ids, mask = rows[2], rows[3]
        return list(self.inner(part, local, response_ids, mask & own, None, places))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """As the engine's: the gradients of all losses of the group. A collective of the group."""
        assert self._waiting is not None, "backward follows a call with gradients"
        (everyones, figures), self._waiting = self._waiting, None
        found = torch.autograd.grad(loss, figures, allow_unused=True)
        own = [torch.zeros_like(f) if g is None else g for f, g in zip(figures, found, strict=True)]
        for giver, theirs in enumerate(everyones):
            gradients = self.sharing.given(own, giver)
            parts = self._parts(theirs)
            weighed = [(p * g).sum() for p, g in zip(parts, gradients, strict=True)]
            ends = last and giver == self.sharing.ranks - 1
            self.inner.backward(torch.stack(weighed).sum(), last=ends)


def share_rows(models: Models, engine: EngineConfig) -> None:
    """Let the ranks share the rows of all `models`, and prove that their figures stay what they
    were. Raises UserError by the family's name. A collective.
    """
    sharing = Sharing(engine.sequence_parallel)
    before = _figures(models)
    own = [models.policy, models.critic, models.reference]
    for model in own:
        if isinstance(model, nn.Module) or hasattr(model, "module"):
            sharing.attend_by_heads(module_of(model).model)
    models.policy = SharedEngine(models.policy, sharing)
    if models.critic is not None:
        models.critic = SharedEngine(models.critic, sharing)
    if models.reference not in (None, ADAPTER):
        models.reference = SharedEngine(models.reference, sharing)
    policy = module_of(models.policy).model
    try:
        apart = [difference(a, b, policy) for a, b in zip(_figures(models), before, strict=True)]
        problem = next((one for one in apart if one is not None), None)
    except ERRORS as error:
        problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    sharing.refuse(problem, policy)


def _figures(models: Models) -> Sequence[Tensor]:
    """Logprobs of the policy and the reference, and a critic's values, on a made-up row, another
    one on each rank.
    """
    vocabulary = int(module_of(models.policy).model.config.get_text_config().vocab_size)
    first = 3 * distributed.rank()
    ids = [(first + number) % vocabulary for number in range(_PROMPT + _RESPONSE)]
    batch = collate([ids[:_PROMPT]], [ids[_PROMPT:]], 0, distributed.device())
    group = torch.zeros(1, dtype=torch.long, device=distributed.device())
    layout = Layout(_PROMPT + _RESPONSE)
    out = [policy_logprobs(models.policy, batch, group, [0], layout)[0]]
    if models.reference not in (None, ADAPTER):
        out.append(policy_logprobs(models.reference, batch, group, [0], layout)[0])
    if models.critic is not None:
        out.append(critic_values(models.critic, batch, layout.budget))
    return out
