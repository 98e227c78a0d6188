"""Whether two ways to the same logprobs agree, as far as rounding lets them.

Before training: what a policy says of 16 tokens is what its model's own forward says of them. The
policy reads responses beside each other, padded on the right and without a mask, and shared prompts
in one row. That is right for a causal model whose backbone and head are where transformers has them
in most families. Whether they are there is measured here rather than kept as a list.

In half precision, how far two correct engines can be apart. bfloat16 keeps 8 bits of every number.
Two engines that add up in another order round otherwise in each layer, and of a 135M model's
logprobs single ones then differ by 0.3 nats, 0.05 in the mean. No fixed bound tells that from a
wrong layer: it depends on the model, its weights and the tokens. So the trainer computes its
logprobs a second time with every layer's output moved by up to half a step of its number format, at
random (`rounding_otherwise`). What that changes is what another engine may differ by.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import EngineConfig
from policy.batching import collate
from policy.forward import ADAPTER, Layout, Models, module_of, policy_logprobs
from policy.model import LONGEST_DENSE, base_of, reads_pictures, take_segments
from rlhf.process.libraries import first_line
from rlhf.types import UserError

log = logging.getLogger(__name__)
_PROMPT, _TOKENS, _SHORT = 4, 16, 11  # tokens: of the prompt, of a whole row, of a shorter one
# What rounding explains, nats: the largest gap in float32, below which nothing is measured in half
# precision either; the usual mean gap in half precision.
FLOAT32_GAP, _HALF_GAP = 1e-4, 0.1
# Families whose packed rows were measured equal to rows of their own, under full attention:
# `python -m benchmarks.families` (docs/models.md). `packs_agree` measures each model again.
_EQUAL = """
    apertus arcee aria_text axk1 biogpt bitnet cohere ctrl dbrx deepseek_v2 deepseek_v3 diffllama
    doge emu3_text_model ernie4_5 ernie4_5_moe falcon flex_olmo fuyu gemma glm glm4 glm4_moe
    glm4_moe_lite gpt2 gpt_bigcode gpt_neox granite granitemoe granitemoeshared helium
    hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jais2 jetmoe llama longcat_flash minicpm3
    minimax_m2 ministral3 mistral mixtral nanochat nemotron olmo olmo2 olmoe opt persimmon phi
    phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open
    stablelm starcoder2 youtu
"""
_SEED = 20_251_129
_PASSING = (nn.Identity, nn.Dropout)  # layers that compute nothing


# ---- before training ----


def check_agreement(model: Any, budget: int, key: str = "model.path") -> None:
    """Raises UserError by the family's name where the policy's path can't run it, or gives other
    log-probabilities than its own forward. Collective under ZeRO-3.

    `model`: an engine around a PolicyModule, or the module itself. `budget`: tokens per
    micro-batch. key: the option of the model, for the message.
    """
    family = base_of(module_of(model).model).config.model_type
    try:
        reason = _difference(model, Layout(budget))
    except UserError:
        raise
    # A family's code may want anything that the policy does not give: a language, an image.
    except Exception as error:
        reason = f"16 tokens end in {type(error).__name__}: {first_line(error)}"
        raise UserError(f"{key}: {family} can't be a policy here: {reason}") from error
    if reason is not None:
        raise UserError(f"{key}: {family} can't be a policy here: {reason}")


def can_share_prompts(model: Any) -> bool:
    """Whether the model takes a mask of ours: full causal attention in every layer, positions by
    id, sdpa (eager attention would add the mask). One that reads pictures has its own ideas of
    masks and positions, and gets rows of their own.
    """
    if reads_pictures(model):
        return False
    config = model.config.get_text_config()
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    layers = getattr(config, "layer_types", None)
    if layers is not None and any(kind != "full_attention" for kind in layers):
        return False
    windowed = getattr(config, "sliding_window", None) is not None and getattr(
        config, "use_sliding_window", True
    )
    return config.model_type in _EQUAL.split() and not windowed


def packs_agree(model: Any, layout: Layout) -> bool:
    """Whether responses that share a prompt in one row get the log-probabilities that they get in
    rows of their own, by 16 tokens. `model` as above. Collective under ZeRO-3.
    """
    module = module_of(model)
    rows = _rows(base_of(module.model))
    with _as_it_samples(module):
        alone = _policy_logprobs(model, rows, replace(layout, shared=False))
        packed = _policy_logprobs(model, rows, replace(layout, shared=True))
    return _gap(alone, packed) <= _tolerance(module, rows)


def _tolerance(module: Any, rows: list[list[int]]) -> float:
    """The mean gap that rounding explains, nats: in half precision what it does to the model's own
    forward on these rows, where that is above the usual. Collective under ZeRO-3.
    """
    lm = base_of(module.model)
    if lm.dtype is torch.float32:
        return FLOAT32_GAP
    with _as_it_samples(module), torch.no_grad():
        plain = [_own_logprobs(lm, row) for row in rows]
        with rounding_otherwise(lm):
            moved = [_own_logprobs(lm, row) for row in rows]
    return max(_HALF_GAP, _gap(plain, moved))


def _difference(model: Any, layout: Layout) -> str | None:
    """What the policy's path gets wrong, in a clause; None where it is right."""
    module = module_of(model)
    lm = base_of(module.model)
    rows = _rows(lm)
    tolerance = _tolerance(module, rows)
    with _as_it_samples(module), torch.no_grad():
        own = [_own_logprobs(lm, row) for row in rows]
        alone = _gap(own[:1], _policy_logprobs(model, rows[:1], layout))
        padded = _gap(own, _policy_logprobs(model, rows, layout))
        later = _gap([own[0][: _SHORT - 1]], [_own_logprobs(lm, rows[0][:_SHORT])])
    if not later <= tolerance:
        return (
            "a token's logits change with the tokens after it "
            f"({later:.1e} nats), so it is no causal model."
        )
    if not alone <= tolerance:
        return (
            f"the policy's log-probabilities are {alone:.1e} nats from those of the model's own "
            f"forward (mean of {_TOKENS - _PROMPT} tokens), so its logits don't come from its last "
            "hidden states alone."
        )
    if not padded <= tolerance:
        return f"padding after a row changes its log-probabilities by {padded:.1e} nats."
    return None


@contextmanager
def _as_it_samples(module: Any) -> Iterator[None]:
    """In evaluation mode, at temperature 1."""
    modes = {part: part.training for part in module.modules()}
    temperature, module.temperature = module.temperature, 1.0
    module.eval()
    try:
        yield
    finally:
        module.temperature = temperature
        for part, training in modes.items():
            part.training = training


def _rows(lm: Any) -> list[list[int]]:
    """Two rows of token ids, of one prompt, without the ids that configurations name: pictures,
    padding and the like.
    """
    vocabulary = int(lm.config.get_text_config().vocab_size)
    named = set(_named_ids(lm.config.to_dict()))
    ids: list[int] = []
    for number in range(vocabulary):
        # a step that meets every id once where it has no factor in common with their number
        token = (3 + 7919 * number) % vocabulary
        if token not in named:
            ids.append(token)
        if len(ids) == 2 * _TOKENS:
            break
    ids *= 1 + 2 * _TOKENS // max(1, len(ids))  # a vocabulary may be as small as a test's
    first = ids[:_TOKENS]
    return [first, first[:_PROMPT] + ids[_TOKENS : _TOKENS + _SHORT - _PROMPT]]


def _named_ids(config: dict[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _named_ids(value)
        elif str(name).endswith(("token_id", "token_index")):
            values = value if isinstance(value, list) else [value]
            yield from (v for v in values if isinstance(v, int))


def _own_logprobs(lm: Any, row: list[int]) -> Tensor:
    """log p(row[i] | row[:i]) [len(row) - 1] nats for i >= 1, by the model's own forward."""
    ids = torch.tensor([row], device=lm.device)
    log_p = torch.log_softmax(lm(input_ids=ids).logits[0, :-1].float(), dim=-1)
    return log_p.gather(1, ids[0, 1:, None]).squeeze(1)


def _policy_logprobs(model: Any, rows: list[list[int]], layout: Layout) -> list[Tensor]:
    """The same of each row's response, by the policy."""
    prompts = [row[:_PROMPT] for row in rows]
    responses = [row[_PROMPT:] for row in rows]
    device = base_of(module_of(model).model).device
    batch = collate(prompts, responses, 0, device)
    groups = torch.zeros(len(rows), dtype=torch.long, device=device)
    numbers = list(range(len(rows)))
    logprobs, _ = policy_logprobs(model, batch, groups, numbers, layout)
    return [logprobs[row, : len(responses[row])] for row in numbers]


def _gap(own: list[Tensor], policy: list[Tensor]) -> float:
    """The mean distance in nats over the last tokens, which both have; of all rows the largest."""
    gaps = []
    for ours, theirs in zip(policy, own, strict=True):
        count = min(len(ours), len(theirs))
        gaps.append((ours[-count:] - theirs[-count:]).abs().mean())
    return float(torch.stack(gaps).max())  # no number where any is none


def agreed_layout(models: Models, engine: EngineConfig) -> Layout:
    """The layout, where the policy's path gives what the model's own forward gives; without shared
    prompts where these don't. Raises UserError otherwise.
    """
    check_agreement(models.policy, engine.micro_tokens)
    layout = models.layout
    if not layout.shared:
        return layout
    if packs_agree(models.policy, layout):
        return _by_segments(models, layout)
    family = base_of(module_of(models.policy).model).config.model_type
    if engine.share_prompts:
        raise UserError(
            f"engine.share_prompts=true: responses of {family} that share a prompt in one row get "
            "other log-probabilities than in rows of their own. Set engine.share_prompts=null."
        )
    log.warning(
        "engine.share_prompts: off, because responses of %s that share a prompt in one row get "
        "other log-probabilities than in rows of their own.",
        family,
    )
    return replace(layout, shared=False)


def _by_segments(models: Models, layout: Layout) -> Layout:
    """`layout` with attention by segments in long rows, where that gives what dense masks give."""
    reads = [models.policy]
    if models.reference not in (None, ADAPTER):
        reads.append(models.reference)
    reason = "its code doesn't ask transformers for its attention"
    if all(take_segments(base_of(module_of(model).model)) for model in reads):
        reason = "its log-probabilities would be others"
        # A family's code may read the mask by itself.
        try:
            if packs_agree(models.policy, replace(layout, longest_dense=0)):
                return replace(layout, longest_dense=LONGEST_DENSE)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = str(error)
    family = base_of(module_of(models.policy).model).config.model_type
    log.warning(
        "engine.share_prompts: long rows of %s have dense masks, which take more memory (%s).",
        family,
        reason,
    )
    return layout


# ---- rounding in half precision ----


@dataclass(frozen=True, slots=True)
class Spread:
    """Absolute differences of logprobs over some tokens, nats."""

    mean: float
    tail: float  # one in a hundred is larger


def spread(differences: Sequence[float]) -> Spread:
    """Of at least one difference."""
    values = torch.tensor(differences, dtype=torch.float64).abs()
    return Spread(float(values.mean()), float(values.quantile(0.99)))


def rounding_spread(model: Any, plain: Sequence[float], again: Callable[[], list[float]]) -> Spread:
    """How far rounding alone moves the logprobs `plain` of `model` (nats per token), at least
    FLOAT32_GAP. `again` computes them anew; under ZeRO-3 it is a collective.
    """
    with rounding_otherwise(model):
        moved = again()
    found = spread([a - b for a, b in zip(plain, moved, strict=True)])
    return Spread(max(found.mean, FLOAT32_GAP), max(found.tail, FLOAT32_GAP))


@contextmanager
def rounding_otherwise(model: nn.Module) -> Iterator[None]:
    """Meanwhile every layer's output in half precision is moved by up to half a step of its number
    format, by random numbers of their own, the same each time.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def move(layer: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.dtype not in (torch.bfloat16, torch.float16):
            return None
        if output.device not in generators:
            generators[output.device] = torch.Generator(output.device).manual_seed(_SEED)
        drawn = torch.rand(output.shape, generator=generators[output.device], device=output.device)
        half_step = torch.finfo(output.dtype).eps / 2
        return (output.float() * (1 + half_step * (2 * drawn - 1))).to(output.dtype)

    leaves = [layer for layer in model.modules() if next(layer.children(), None) is None]
    hooks = [
        layer.register_forward_hook(move) for layer in leaves if not isinstance(layer, _PASSING)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
