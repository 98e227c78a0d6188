"""GeLoRA (Ed-dib, Datbayev, Aboussalah 2024, arXiv:2412.09250): LoRA whose rank in each block
follows from the intrinsic dimension of the hidden states before and after it.

With d_i the dimension of what goes into block i, every adapted matrix of the block has the rank
r_i = max(d_{i+1} - d_i, 0) + 1, and alpha_i / r_i is the same everywhere. The dimensions are those
of the untrained model on a sample of the rows, by TwoNN (policy/adapters/dimension.py).

What of this was looked up: the abstract, and a public review that quotes the formula, one rank for
all matrices of a block, and alpha_i / r_i = 32. The paper's text was not to be had, and no code of
its authors. So these are ours: the difference is rounded to the next whole number (the rank stays
above the paper's bound), a row's point is the mean over its tokens, a reading is the mean over
random halves and corrected for few rows, and the ratio is adapter.alpha / adapter.rank, so that
adapter.rank is only half of a ratio here. A module outside of the blocks gets adapter.rank.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from conf.adapters import planned_rank
from conf.choices import AdapterKind
from conf.schema import AdapterConfig
from policy.adapters import Fresh, Method, Rows, lora
from policy.adapters.dimension import dimension
from policy.adapters.hidden import block_of, block_states
from rlhf.process import distributed
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.policy")
FEW = 512  # rows below which the dimensions spread widely
_FEWEST = 8  # below which nothing can be fitted


@dataclasses.dataclass(frozen=True, slots=True)
class Ranks:
    """What GeLoRA found: how many rows it read, the dimensions before, between and after the blocks
    of each stack, and the rank of each adapted module by its name.
    """

    rows: int
    dimensions: dict[str, list[float]]
    ranks: dict[str, int]


def block_rank(before: float, after: float) -> int:
    """max(d_{i+1} - d_i, 0) + 1, the difference rounded."""
    return round(max(after - before, 0.0)) + 1


def dimensions_of(states: Tensor) -> list[float]:
    """The intrinsic dimension of each of the clouds `states` [blocks + 1, N, H]. Raises ValueError
    where a cloud's points coincide.
    """
    return [dimension(cloud) for cloud in states]


def find(model: Any, targets: Sequence[str], rows: Rows, pad_id: int) -> Ranks:
    """The ranks for the modules `targets` (full names) of the untrained `model`, by `rows` (token
    ids); rows that are the same count once. Raises UserError where there are too few.
    """
    chosen = _distinct(rows)
    blocks = {name: block_of(name) for name in targets}
    stacks = sorted({block[0] for block in blocks.values() if block is not None})
    dimensions = {}
    for stack, states in block_states(model, stacks, chosen, pad_id).items():
        try:
            dimensions[stack] = dimensions_of(states)
        except ValueError as error:
            raise UserError(
                f"adapter=gelora: the hidden states of {len(chosen)} rows in {stack} have no "
                f"intrinsic dimension: {error}. Use adapter=lora, or more rows."
            ) from error
    ranks = {}
    for name, block in blocks.items():
        if block is not None:
            stack, number = block
            ranks[name] = block_rank(*dimensions[stack][number : number + 2])
    return Ranks(len(chosen), dimensions, ranks)


def _distinct(rows: Rows) -> Rows:
    """The rows that differ. Raises UserError for too few, and warns of few."""
    distinct = [row for row in dict.fromkeys(tuple(row) for row in rows) if row]
    count = len(distinct)
    if count < _FEWEST:
        raise UserError(
            f"adapter=gelora: {count} different rows are too few to tell the dimension of the "
            f"hidden states: at least {_FEWEST}, better {FEW}. Give more rows (data.path, "
            "adapter.sample_rows), or set adapter=lora."
        )
    if count < FEW:
        LOG.warning(
            "adapter=gelora: the dimensions of the hidden states come from %d different rows of "
            "%d, where %d or more are meant to be read: a dimension d spreads by about d / %.0f.",
            count,
            len(rows),
            FEW,
            count**0.5,
        )
    return distinct


def remembered(path: Path | None) -> Ranks | None:
    """What `remember` wrote into `path`; None where it did not. Raises UserError for a file that
    holds something else.
    """
    if path is None or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Ranks(
            rows=int(content["rows"]),
            dimensions={k: [float(d) for d in v] for k, v in content["dimensions"].items()},
            ranks={name: int(rank) for name, rank in content["ranks"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} should hold the ranks that adapter=gelora found, but can't be read ({error}). "
            "Begin anew with run.overwrite=true."
        ) from error


def remember(path: Path, found: Ranks) -> None:
    """Write `found` for a resumed run, whose weights have these ranks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    side = path.with_suffix(".part")
    side.write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n", encoding="utf-8")
    side.replace(path)


def with_ranks(adapter: AdapterConfig, found: Ranks) -> AdapterConfig:
    """The plain LoRA of these ranks: a pattern per module, alpha_i / r_i as adapter.alpha /
    adapter.rank.
    """
    ratio = adapter.alpha / adapter.rank
    return dataclasses.replace(
        adapter,
        kind=AdapterKind.lora,
        sample_rows=AdapterConfig().sample_rows,  # they were looked at already
        rank_pattern=dict(found.ranks),
        alpha_pattern={name: rank * ratio for name, rank in found.ranks.items()},
    )


def agreed(model: Any, targets: Sequence[str], fresh: Fresh) -> Ranks:
    """The ranks that this run found before (in fresh.record), else `find`'s, which are written
    there. Rank 0 looks; all get the same. A collective; raises UserError on all ranks.
    """
    found, wrong = None, None
    if distributed.is_main():
        try:
            found = None if fresh.record is None else remembered(fresh.record)
            if found is None:
                found = _looked_up(model, targets, fresh)
        except UserError as error:  # the others wait for the outcome
            wrong = str(error)
    found, wrong = distributed.broadcast((found, wrong))
    if wrong is not None:
        raise UserError(wrong)
    assert found is not None
    return found


def _looked_up(model: Any, targets: Sequence[str], fresh: Fresh) -> Ranks:
    if fresh.sample is None:
        raise UserError("adapter=gelora reads rows before it trains, and none are given here.")
    pad_id = model.config.get_text_config().pad_token_id or 0
    place = model.device
    found = find(model.to(distributed.device()), targets, fresh.sample(), pad_id)
    model.to(place)
    if fresh.record is not None:
        remember(fresh.record, found)
    return found


def attach(model: Any, adapter: AdapterConfig, fresh: Fresh) -> Any:
    """`model` with a fresh LoRA of the ranks that its hidden states ask for. A collective; raises
    UserError.
    """
    found = agreed(model, list(lora.adapted_linears(model, adapter)), fresh)
    adapted = lora.attach(model, with_ranks(adapter, found), fresh)
    adapted.found = lambda: as_found(found)
    return adapted


def as_found(ranks: Ranks) -> dict[str, Any]:
    """For summary.json and the plots."""
    return {
        "method": "gelora",
        "rows": ranks.rows,
        "rank": ranks.ranks,
        "dimension": {
            f"{stack}.{number}": round(value, 3)
            for stack, values in ranks.dimensions.items()
            for number, value in enumerate(values)
        },
    }


def expected(model: Any, adapter: AdapterConfig) -> int:
    """About r (in + out) for each layer adapted: which ranks the rows ask for is known later."""
    options = dataclasses.replace(adapter, rank=planned_rank(adapter))
    return lora.expected(model, options)


METHOD = Method(attach=attach, expected=expected, check=lora.check)
