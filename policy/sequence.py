"""Rows shared by several ranks: each holds a part of every row's tokens, so that rows may be longer
than one device's memory (Ulysses: Jacobs et al. 2023, arXiv:2309.14509).

    tokens of a row       0 1 2 3 4 5 6 7
    rank 0, rank 1        0 1 2 3 | 4 5 6 7      all layers but attention work token by token
    attention             heads 0, 1 | heads 2, 3, each over all tokens

Before each attention the ranks of a group exchange queries, keys and values, so that each has some
heads of all tokens, and afterwards the results. The exchange is DeepSpeed's
(`policy.engines.deepspeed.ulysses`), and so is its gradient. DeepSpeed's engine knows nothing of
groups: a parameter's gradient is a sum over tokens, so parts of rows add up over ranks as whole
rows do.

Attention is causal by place and rows are padded on the right, so no mask is needed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AttentionInterface, AttentionMaskInterface

from policy.engines.deepspeed import ensure_process_group, prepare_cpu, ulysses
from policy.model import base_of
from rlhf.process import distributed
from rlhf.types import UserError

# Our name among transformers' implementations of attention.
BY_HEADS = "sdpa_by_heads"
IGNORED = -100  # a label that does not train
# Names of a mesh's dimensions: accelerate hands ranks along "tp" the same rows.
GROUPS, RANKS = "dp", "tp"
# What a family's code may raise where it gets another shape than it expects.
ERRORS = (AssertionError, RuntimeError, TypeError, ValueError)
# Largest mean difference of figures, as a share of their spread, that the order of sums explains.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
_PROBED = 16  # tokens on each rank


class Sharing:
    """This rank's place among ranks that share rows. Making one is a collective."""

    def __init__(self, ranks: int) -> None:
        """ranks: that share a row, a divisor of all; neighbours, so that they are on one node."""
        prepare_cpu()
        ensure_process_group()
        self.ranks = ranks
        self.groups = distributed.world_size() // ranks
        kind = distributed.device().type
        shape = (self.groups, ranks)
        self.mesh: DeviceMesh = init_device_mesh(kind, shape, mesh_dim_names=(GROUPS, RANKS))
        self.group: Any = self.mesh[RANKS].get_group()
        self.number: int = dist.get_rank(self.group)  # of this rank in its group
        self.own_group = distributed.rank() // ranks  # its group's number
        self._exchanges: dict[tuple[int, int, int], Any] = {}  # by heads

    # ---- parts of rows ----

    def part(self, whole: Tensor, fill: int) -> Tensor:
        """This rank's columns of [B, L]: [B, ceil(L / ranks)], `fill` beyond L."""
        width = -(-whole.shape[1] // self.ranks)
        padded = F.pad(whole, (0, width * self.ranks - whole.shape[1]), value=fill)
        return padded[:, width * self.number : width * (self.number + 1)]

    def positions(self, whole: Tensor) -> Tensor:
        """Positions [B, ceil(L / ranks)] of this rank's columns of [B, L]; padding has the last."""
        numbers = torch.arange(whole.shape[1], device=whole.device).expand_as(whole)
        return self.part(numbers, whole.shape[1] - 1)

    def split(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of a batch: `input_ids`, `attention_mask` and `labels` [B, L] become
        [B, ceil(L / ranks)] with `position_ids` and `shift_labels`, each token's label being the
        next token, wherever that is. Anything else is as it was.
        """
        ids, labels = inputs["input_ids"], inputs["labels"]
        after = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        out = {name: value for name, value in inputs.items() if name != "labels"}
        return out | {
            "input_ids": self.part(ids, 0),
            "attention_mask": self.part(inputs["attention_mask"], 0),
            "position_ids": self.positions(ids),
            "shift_labels": self.part(after, IGNORED),
        }

    # ---- between the ranks of a group ----

    def given(self, tensors: Sequence[Tensor], giver: int) -> list[Tensor]:
        """The `tensors` of the group's rank `giver`, whose number and dtypes all ranks have alike.
        A collective.
        """
        source = self.own_group * self.ranks + giver
        out = []
        for tensor in tensors:
            shape = torch.tensor(tensor.shape, device=tensor.device)
            dist.broadcast(shape, source, group=self.group)
            sent = tensor.contiguous()
            if giver != self.number:
                sent = tensor.new_empty(shape.tolist())
            flags = sent.dtype is torch.bool  # which not every backend sends
            sent = sent.to(torch.uint8) if flags else sent
            dist.broadcast(sent, source, group=self.group)
            out.append(sent.bool() if flags else sent)
        return out

    def total(self, part: Tensor) -> Tensor:
        """The sum of the group's tensors, without a gradient. A collective."""
        whole = part.detach().clone()
        dist.all_reduce(whole, group=self.group)
        return whole

    # ---- attention ----

    def attend_by_heads(self, model: Any) -> None:
        """Let `model`, whose attention is sdpa, attend by heads from now on."""
        AttentionInterface.register(BY_HEADS, self._attend)
        AttentionMaskInterface.register(BY_HEADS, _no_mask)
        lm = base_of(model)
        lm.set_attn_implementation(BY_HEADS)
        for module in lm.modules():
            # `turn_off_dropout` gives the modules a configuration of their own
            config: Any = getattr(module, "config", None)
            if getattr(config, "_attn_implementation", None) == "sdpa":
                config._attn_implementation = BY_HEADS

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention: `query` [B, heads, L / ranks, D] -> [B, L / ranks, heads, D]."""
        if attention_mask is not None or options.get("position_bias") is not None:
            raise ValueError("its code makes a mask, or a bias, of its own")
        rows, heads, length, size = query.shape
        if "position_ids" not in options:  # DeepSpeed gathers them for kernels that read them
            options["position_ids"] = torch.zeros(rows, length, dtype=torch.long)
        counts = (heads, key.shape[1], size)
        if counts not in self._exchanges:
            self._exchanges[counts] = ulysses(AttentionInterface()["sdpa"], counts, self.group)
        exchange = self._exchanges[counts]
        _expect(exchange, query, key)
        found, _ = exchange(module, query, key, value, None, **options)
        return found.reshape(rows, length, heads, -1), None

    def take(self, model: Any) -> None:
        """Let `model` attend by heads, and prove that its logits stay what they were. Raises
        UserError by the family's name. A collective.
        """
        lm = base_of(model.to(distributed.device()))
        config = lm.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or _PROBED * self.ranks
        width = min(_PROBED, limit // self.ranks)  # of each rank
        ids = torch.arange(width * self.ranks, device=distributed.device())
        ids = ids.remainder(int(config.vocab_size))[None]
        expected = _logits(model, ids).chunk(self.ranks, dim=1)[self.number]
        self.attend_by_heads(model)
        try:
            found = _logits(model, self.part(ids, 0), self.positions(ids))
            problem = difference(found, expected, model)
        except ERRORS as error:
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        self.refuse(problem, model)

    def refuse(self, problem: str | None, model: Any) -> None:
        """Raise UserError on all ranks where one has a `problem`. A collective."""
        problems = [found for found in distributed.gather(problem) if found is not None]
        if problems:
            raise UserError(
                f"engine.sequence_parallel={self.ranks}: ranks can't share the rows of "
                f"{base_of(model).config.model_type}: {problems[0]}. "
                "Set engine.sequence_parallel=1."
            )


def difference(found: Tensor, expected: Tensor, model: Any) -> str | None:
    """What is wrong with figures of shared rows, beside those of whole ones; None where what is
    apart is rounding.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    spread = expected.std().clamp(min=1e-3)  # a fresh critic's is 0
    apart = (found - expected).abs().mean() / spread
    if float(apart) <= _TOLERANCE.get(dtype, 1e-4):
        return None
    return f"its figures differ by {float(apart):.2g} of their spread from those of whole rows"


def _logits(model: Any, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """[B, L, vocabulary] float32, in evaluation mode."""
    training = model.training
    kwargs = {} if positions is None else {"position_ids": positions}
    try:
        with torch.no_grad():
            found = model.eval()(input_ids=ids, use_cache=False, **kwargs)
    finally:
        model.train(training)
    logits: Tensor = found.logits.float()
    return logits


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """transformers' mask for BY_HEADS: attention is causal by place."""


def _expect(exchange: Any, query: Tensor, key: Tensor) -> None:
    """DeepSpeed's module is made for one number of rows, which differs from batch to batch."""
    rows = query.shape[0]
    shapes = (query.shape, key.shape)
    exchange.batch_size = rows
    names = ("required_query_shape", "required_key_value_shape")
    for name, (_, heads, length, size) in zip(names, shapes, strict=True):
        setattr(exchange, name, torch.Size((length, rows, heads, size)))
    length, _, width = exchange.required_context_shape
    exchange.required_context_shape = torch.Size((length, rows, width))
