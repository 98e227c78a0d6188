"""What is tried with one family's tiny model, and how each try ends."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.choices import AdapterKind, RolloutBackend
from conf.online import OnlineStage
from conf.schema import AdapterConfig, Config, DataConfig, ModelConfig, RolloutConfig
from policy.adapters import attach
from policy.agreement import can_share_prompts, check_agreement
from policy.batching import Batch, collate, pack
from policy.model import CriticModule, PolicyModule, trainable, turn_off_dropout
from policy.saving import iterate_weights, save_adapter, save_model
from reward.model import load_reward_module, score_ids
from rlhf.models.facts import check_forward
from rlhf.models.loading import load_causal_lm, load_classifier, train_tokenizer
from rlhf.process.libraries import first_line
from rlhf.stages import methods
from rlhf.types import FullWeights, UserError
from rollout import make_generator

RIGHT, REFUSED, WRONG, CRASHED = "right", "refused", "wrong", "crashed"
_TOLERANCE = 1e-4  # nats, and units of the score
_PROMPT, _LENGTHS = 6, (40, 23, 31)  # tokens: of the shared prompt, of prompt and response
_BUDGET = 4096  # tokens per micro-batch

Outcome = dict[str, str]  # how it ended, and why


def outcome(attempt: Callable[[], float]) -> Outcome:
    """How an attempt ends, which returns its largest gap."""
    try:
        gap = attempt()
    except UserError as error:
        return {"end": REFUSED, "why": str(error)}
    except Exception as error:  # noqa: BLE001  the table says which
        return {"end": CRASHED, "why": f"{type(error).__name__}: {first_line(error)[:200]}"}
    if gap <= _TOLERANCE:
        return {"end": RIGHT, "why": f"{gap:.1e}"}
    return {"end": WRONG, "why": f"{gap:.1e}"}


def rows(vocabulary: int) -> list[list[int]]:
    """Token ids of three responses to one prompt."""
    generator = torch.Generator().manual_seed(1)
    low = min(10, vocabulary // 4)
    out = []
    prompt = torch.randint(low, vocabulary, (_PROMPT,), generator=generator).tolist()
    for length in _LENGTHS:
        rest = torch.randint(low, vocabulary, (length - _PROMPT,), generator=generator)
        out.append(prompt + rest.tolist())
    return out


def policy_gap(model: Any) -> float:
    """The policy's log-probabilities and their gradient against a plain forward, row by row.

    Raises UserError where the check at start refuses.
    """
    module = PolicyModule(model, chunk=7)
    check_agreement(module, _BUDGET)
    turn_off_dropout(model)
    module.train()  # some families' gradients need it
    batch, plain = _batch(model)
    ours = _logprobs(module, batch)
    own = [_plain_logprobs(model, row) for row in plain]
    gap = max(_largest(a, b) for a, b in zip(ours, own, strict=True))
    # the largest difference of gradients, beside the largest gradient
    return max(gap, _gradient_gap(model, ours, own))


def packed_gap(model: Any) -> float:
    """Responses that share a prompt in one row against rows of their own."""
    if not can_share_prompts(model):
        raise UserError("no shared prompts")
    return forced_packed_gap(model)


def forced_packed_gap(model: Any) -> float:
    """The same whether or not the product would."""
    model.eval()
    module = PolicyModule(model, chunk=7)
    batch, _ = _batch(model)
    packed = pack(batch, [list(range(len(_LENGTHS)))])
    with torch.no_grad():
        together, _ = module(
            packed.input_ids,
            packed.positions,
            batch.response_ids,
            batch.response_mask,
            packed.owner,
            packed.position_ids,
            packed.attention_mask,
        )
        alone = _logprobs(module, batch)
    gaps = [_largest(together[row, : len(own)], own) for row, own in enumerate(alone)]
    return max(gaps)


def _batch(model: Any) -> tuple[Batch, list[list[int]]]:
    whole = rows(model.config.get_text_config().vocab_size)
    prompts = [row[:_PROMPT] for row in whole]
    return collate(prompts, [row[_PROMPT:] for row in whole], 0), whole


def _logprobs(module: Any, batch: Batch) -> list[Tensor]:
    logprobs, _ = module(batch.input_ids, batch.positions, batch.response_ids, batch.response_mask)
    counts = batch.response_mask.sum(dim=1).tolist()
    return [logprobs[row, :count] for row, count in enumerate(counts)]


def _plain_logprobs(model: Any, row: list[int]) -> Tensor:
    ids = torch.tensor([row])
    log_p = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
    return log_p.gather(1, ids[0, 1:, None]).squeeze(1)[_PROMPT - 1 :]


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def _gradient_gap(model: Any, ours: list[Tensor], own: list[Tensor]) -> float:
    params = [p for p in model.parameters() if p.requires_grad]
    found = _gradients(ours, params)
    wanted = _gradients(own, params)
    gap, size = 0.0, 1e-6
    for a, b in zip(found, wanted, strict=True):
        if a is None and b is None:
            continue
        if a is None or b is None:
            return float("inf")
        gap, size = max(gap, _largest(a, b)), max(size, float(b.abs().max()))
    return gap / size


def _gradients(logprobs: list[Tensor], params: list[Any]) -> tuple[Tensor | None, ...]:
    """Of their mean; None for a parameter that has no part in it."""
    return torch.autograd.grad(torch.cat(logprobs).mean(), params, allow_unused=True)


def reward_gap(model: Any, directory: Path) -> float:
    """A reward model on the family: trained for a step, saved, and read back; as a critic too."""
    ids = rows(model.config.get_text_config().vocab_size)
    model.save_pretrained(directory / "policy")
    classifier = load_classifier(ModelConfig(path=str(directory / "policy")), _tokenizer())
    check_forward(classifier, "a reward model")
    turn_off_dropout(classifier)
    classifier.train()
    values = CriticModule(classifier)(torch.tensor(ids[:1]), torch.tensor([[3, 5]]))
    values.sum().backward()
    with torch.no_grad():
        for param in classifier.parameters():
            if param.grad is not None:
                param.add_(param.grad, alpha=-0.01)
    classifier.eval()
    trained = score_ids(classifier, ids, 64, torch.device("cpu"))
    with torch.no_grad():
        alone = [float(classifier(input_ids=torch.tensor([row])).logits) for row in ids]
    classifier.save_pretrained(directory / "reward")
    again = load_reward_module(directory / "reward", torch.float32)
    read_back = score_ids(again, ids, 64, torch.device("cpu"))
    own = torch.tensor(alone)
    return max(_largest(torch.tensor(trained), own), _largest(torch.tensor(read_back), own))


def adapter_gap(model: Any, directory: Path) -> float:
    """A LoRA adapter on every linear layer, with updates that are not zero: what it gives, against
    what the whole weights and the adapter give that are saved and read back.
    """
    ids = torch.tensor(rows(model.config.get_text_config().vocab_size)[:1])
    base = directory / "policy"
    model.save_pretrained(base)
    check_forward(model, "a policy")
    methods.register()
    settings = AdapterConfig(kind=AdapterKind.lora, rank=4)
    adapted = attach(model, settings, task="CAUSAL_LM", base=str(base))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in trainable(adapted):
            param.add_(0.05 * torch.randn(param.shape, generator=generator))
        trained = adapted.eval()(input_ids=ids).logits
        save_model(adapted, _tokenizer(), directory / "model")
        save_adapter(adapted, directory / "adapter")
        gaps = []
        for name in ("model", "adapter"):
            again = load_causal_lm(ModelConfig(path=str(directory / name)), _tokenizer())
            gaps.append(_largest(again.eval()(input_ids=ids).logits, trained))
    return max(gaps)


def vllm_gap(model: Any, directory: Path) -> float:
    """vLLM's log-probabilities against the model's own, as it starts and after other weights were
    sent. Raises UserError where it can't run the model.
    """
    model.save_pretrained(directory)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(directory)
    ids = rows(model.config.get_text_config().vocab_size)[0]
    rollout = RolloutConfig(backend=RolloutBackend.vllm, kv_cache_gib=0.05, max_response_length=32)
    data = DataConfig(max_prompt_length=32)
    generator = make_generator(
        Config(stage=OnlineStage(), rollout=rollout, data=data),
        model_path=str(directory),
        tokenizer=tokenizer,
        model_factory=lambda: model,
        adapter_rank=None,
    )
    gaps = [_generator_gap(generator, model, ids)]
    seed = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * param.std(correction=0) * torch.randn(param.shape, generator=seed))
    generator.sync(FullWeights(iterate_weights(model)), 1)
    gaps.append(_generator_gap(generator, model, ids))
    return max(gaps)


def _generator_gap(generator: Any, model: Any, row: list[int]) -> float:
    with torch.no_grad():
        own = torch.log_softmax(model(input_ids=torch.tensor([row])).logits[0, :-1].float(), dim=-1)
    own = own.gather(1, torch.tensor(row[1:])[:, None]).squeeze(1)
    return _largest(torch.tensor(generator.logprobs(row)), own)


@functools.cache
def _tokenizer() -> Any:
    """Any that can be saved: its tokens are never looked at."""
    return train_tokenizer(["a few words"], 260, 512)
