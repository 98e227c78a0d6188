"""A reward model: its directory (weights, tokenizer, template and a manifest, so that any stage
loads it from there alone), and how it reads and scores texts.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.choices import Dtype
from conf.schema import ModelConfig
from rlhf.models.directories import ADAPTER_CONFIG, check_model_path, contents, readable
from rlhf.models.encoding import answer_ids, is_chat, prompt_ids
from rlhf.models.loading import load_classifier, load_tokenizer
from rlhf.models.parts import (
    backbone_name,
    base_model,
    classifier_class,
    one_label_config,
    virtual_tokens,
)
from rlhf.process.files import json_object
from rlhf.types import Tools, UserError

Reader = Callable[..., Tensor]  # `last_token_scores` of some model
# what a picture model reads beside token ids [B, L] of the rows of these numbers
See = Callable[[Sequence[int], Tensor], Mapping[str, Tensor]]
MANIFEST_FILE = "reward_model.json"
FORMAT_VERSION = 1
_KINDS: dict[str, Any] = {  # types of the fields that scoring relies on
    "tokenizer_hash": str,
    "chat_template_hash": str | None,
    "conversational": bool,
    "max_length": int,
    "score_mean": float | int,
    "score_std": float | int,
}
# letters, digits, spaces and a non-ASCII character
_PROBE = "Grüße, reward model! 12 + 3 = 15?\n\tA  well-aligned answer."


@dataclass(frozen=True, slots=True)
class Manifest:
    """What weights and configuration of a reward model don't tell. Scores are raw model outputs."""

    base: str  # what it was trained from: a path, a hub name, or "tiny"
    tokenizer_hash: str  # `tokenizer_fingerprint` of the tokenizer beside it
    chat_template_hash: str | None  # of its chat template; None without one
    conversational: bool  # trained on chat messages rather than on plain text
    max_length: int  # tokens of the longest prompt + response in training
    dtype: str  # of the saved weights, torch's name
    score_mean: float  # over the held-out texts, chosen and rejected
    score_std: float  # over the held-out texts, population form
    held_out_texts: int  # how many texts the two figures come from
    format_version: int = FORMAT_VERSION


class Holder(Protocol):
    """How the ranks hold a reward model's weights: each of them whole, or all of them together."""

    def frozen(self, load: Callable[[], Any], read: Callable[..., Any]) -> Callable[..., Any]:
        """`read` of the model that `load` makes, which then takes its other arguments alone."""
        ...

    def passes(self, own: int) -> int:
        """How often a rank calls what `frozen` returned that needs `own` calls; a collective where
        the ranks hold the weights together.
        """
        ...


@dataclass(slots=True)
class RewardModel:
    module: nn.Module  # sequence classifier with one label, in evaluation mode, on the CPU
    tokenizer: Any
    manifest: Manifest


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash that is equal for tokenizers that give the same ids to the same text. Padding does not
    count, because it never changes a text's ids.
    """
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "probe": tokenizer(_PROBE)["input_ids"],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def template_hash(tokenizer: Any) -> str | None:
    """A hash of the tokenizer's chat template; None where it has no template."""
    template = tokenizer.chat_template
    if template is None:
        return None
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest that makes the model directory `path` that of a reward model."""
    (path / MANIFEST_FILE).write_text(
        json.dumps(dataclasses.asdict(manifest), indent=2) + "\n", encoding="utf-8"
    )


def read_manifest(path: str | Path, key: str = "reward.path") -> Manifest:
    """The manifest of the reward model in the directory `path`, which the option `key` holds.
    Raises UserError where it is missing, of another version, or damaged.
    """
    held = check_model_path(str(path), key)
    file = Path(path).expanduser() / MANIFEST_FILE
    if not file.is_file():
        raise UserError(
            f"{key}={path}: holds no {MANIFEST_FILE}, so it is not a reward model. Expected: the "
            "model/ directory that stage=reward wrote."
        )
    if any(not adapter.is_native for adapter in held.adapters):
        raise UserError(
            f"{key}={path}: holds an adapter ({ADAPTER_CONFIG}) that can be merged. Expected whole "
            "weights, as the model/ directory of the reward run has them."
        )
    content = json_object(file, "this is no reward model that can be used")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file}: format_version is {version!r}, expected {FORMAT_VERSION}. Train the "
            "reward model again with this version."
        )
    names = {f.name for f in dataclasses.fields(Manifest)}
    if set(content) != names:
        raise UserError(
            f"{file}: expected the keys {', '.join(sorted(names))}; found "
            f"{', '.join(sorted(content))}."
        )
    for name, kind in _KINDS.items():
        value = content[name]
        # a bool is an int to isinstance
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            raise UserError(
                f"{file}, key {name!r}: expected {kind}, found {value!r}. "
                "Restore it, or train the reward model again."
            )
    return Manifest(**content)


def load_reward_tokenizer(path: str | Path, key: str = "reward.path") -> tuple[Any, Manifest]:
    """Tokenizer and manifest, without the weights. Raises UserError when the tokenizer is another
    one than in training.
    """
    from transformers import AutoTokenizer

    manifest = read_manifest(path, key)
    with readable(f"{key}={path}: its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(Path(path).expanduser()))
    if tokenizer_fingerprint(tokenizer) != manifest.tokenizer_hash:
        raise UserError(
            f"{key}={path}: its tokenizer files are not those that the reward model was trained "
            f"with (the hash in {MANIFEST_FILE} differs)."
        )
    return tokenizer, manifest


def load_reward_module(path: str | Path, dtype: torch.dtype, key: str = "reward.path") -> Any:
    """The reward model of a directory as a classifier with one label, in evaluation mode, on the
    CPU. Raises UserError for missing weights.
    """
    directory = str(Path(path).expanduser())
    if contents(directory, key).is_native:
        cfg = ModelConfig(path=directory, dtype=Dtype(str(dtype).removeprefix("torch.")))
        # not `load_reward_tokenizer`: at the end of training there is no manifest yet
        return load_classifier(cfg, load_tokenizer(cfg), native=True).eval()
    with readable(f"{key}={path}: the reward model"):
        config = one_label_config(directory)
        module, info = classifier_class(config).from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    if info["missing_keys"]:  # transformers would fill them with random numbers
        raise UserError(
            f"{key}={path}: its weights lack {', '.join(sorted(info['missing_keys']))}, so it is "
            "not a whole reward model."
        )
    return module.eval()


def load_reward_model(path: str | Path, dtype: torch.dtype) -> RewardModel:
    """A reward model from its directory, wherever that was moved to. Raises UserError."""
    tokenizer, manifest = load_reward_tokenizer(path)
    return RewardModel(load_reward_module(path, dtype), tokenizer, manifest)


def longest_text(module: Any) -> int:
    """The most tokens that a model reads at once."""
    lm = base_model(module)
    positions = int(getattr(lm.config.get_text_config(), "max_position_embeddings", 2**31))
    return positions - virtual_tokens(lm)


def last_token_scores(
    module: Any, input_ids: Tensor, lengths: Tensor, seen: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Scores [B] float32, read at the last token of each row. `input_ids` [B, L] is padded on the
    right, `lengths` [B]; seen: what a picture model reads beside them.

    The last token is that of the length, not the one before the first padding id, because padding
    may be the end-of-sequence token. The head runs in float32: half precision would round scores to
    a few hundredths.
    """
    lm = base_model(module)
    backbone = getattr(lm, backbone_name(lm))
    mask = torch.arange(input_ids.shape[1], device=input_ids.device)[None, :] < lengths[:, None]
    # [B, L, H]
    hidden = backbone(
        input_ids=input_ids, attention_mask=mask.long(), use_cache=False, **(seen or {})
    ).last_hidden_state
    last = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1].float()  # [B, H]
    head = lm.score
    # PEFT keeps a head that trained beside an adapter in a module around the first one
    for trained in getattr(head, "modules_to_save", {}).values():
        head = trained
    bias = head.bias
    if bias is not None:
        bias = bias.float()
    return F.linear(last, head.weight.float(), bias).squeeze(-1)


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Row numbers by rising length, in batches of at most `budget` tokens, padding included; a row
    that is longer makes a batch by itself.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[row] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def score_ids(
    module: Any, rows: Sequence[Sequence[int]], budget: int, device: torch.device
) -> list[float]:
    """Scores of rows of token ids, in the order of the rows; `budget` tokens are read at a time."""
    return score_rows(functools.partial(last_token_scores, module), rows, budget, device)


@torch.inference_mode()
def score_rows(
    read: Reader,
    rows: Sequence[Sequence[int]],
    budget: int,
    device: torch.device,
    passes: Callable[[int], int] = int,
    see: See | None = None,
) -> list[float]:
    """`score_ids` by `read`. `passes`: how often every rank calls it, from how often this one has
    to; calls beyond those read a token of no meaning. see: of a picture model.
    """
    out = [math.nan] * len(rows)
    lengths = [len(row) for row in rows]
    batches = list(token_batches(lengths, budget))
    spare = passes(len(batches)) - len(batches)  # a collective, so before the passes
    for batch in batches:
        # the id in the padding is of no importance: it is never attended to
        input_ids = torch.zeros(len(batch), lengths[batch[-1]], dtype=torch.long)
        for line, row in enumerate(batch):
            input_ids[line, : lengths[row]] = torch.tensor(rows[row])
        sizes = torch.tensor([lengths[row] for row in batch], device=device)
        seen = {} if see is None else see(batch, input_ids)
        further = [{name: value.to(device) for name, value in seen.items()}] if seen else []
        scores = read(input_ids.to(device), sizes, *further).tolist()
        for row, score in zip(batch, scores, strict=True):
            out[row] = score
    for _ in range(spare):
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        read(token, torch.ones(1, dtype=torch.long, device=device))
    return out


def reader_of(
    load: Callable[[], Any], device: torch.device, holder: Holder | None
) -> tuple[Reader, Callable[[int], int]]:
    """What reads scores by the reward model that `load` makes, and how often (`score_rows`).
    holder: how the ranks hold it together; None: each of them whole.
    """
    if holder is None:
        return functools.partial(last_token_scores, load().to(device)), int
    return holder.frozen(load, last_token_scores), holder.passes


def same_reading(manifest: Manifest, policy_tokenizer: Any) -> bool:
    """Whether the reward model reads the policy's tokens as they are."""
    return tokenizer_fingerprint(policy_tokenizer) == manifest.tokenizer_hash


def check_tokenizers(
    path: str | Path,
    reward_tokenizer: Any,
    manifest: Manifest,
    policy_tokenizer: Any,
    key: str = "reward.path",
) -> None:
    """Raises UserError for a reward model that can read neither the policy's tokens, because its
    tokenizer is another one, nor the policy's texts, because it has no template.
    """
    if not same_reading(manifest, policy_tokenizer) and reward_tokenizer.chat_template is None:
        raise UserError(
            f"{key}={path}: the reward model has another tokenizer than the policy and no chat "
            "template, so the policy's texts can't be put "
            "into its own format. Expected: a reward model trained from the policy (stage=reward "
            "model.path=<the policy's model directory>), or one "
            "with a template (stage=reward data.chat_template=<file>)."
        )


def text_ids(
    tokenizer: Any,
    manifest: Manifest,
    prompt: Any,
    response: str,
    *,
    finished: bool,
    tools: Tools | None = None,
) -> list[int]:
    """Token ids of prompt and response by the reward model's tokenizer, in the format that it was
    trained on, with the functions that its template shows beside messages.

    `prompt` is a string, or messages for a reward model of conversations; for such a model a string
    becomes the user's turn.
    """
    if manifest.conversational and not is_chat(prompt):
        prompt = [{"role": "user", "content": prompt}]
    context = prompt_ids(tokenizer, prompt, tools if is_chat(prompt) else None)
    return context + answer_ids(tokenizer, prompt, response, tools, finished=finished)
