"""A tokenizer as a GGUF file holds it. llama.cpp splits texts by rules of its own that the file
names: a tokenizer with other rules is refused, since its texts would become other tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.models.encoding import prompt_ids
from rlhf.models.turns import habits
from rlhf.types import UserError

# llama.cpp's names of rules. transformers has the patterns of the others that are known here.
_GPT2, _SMOLLM = "gpt-2", "smollm"
_BY_PATTERN = ("llama-bpe", "qwen2", "tekken")
# rules under which llama.cpp takes a word that is an entry as it is, without looking at merges
_WHOLE_WORDS = ("llama-bpe", "tekken")
# transformers reads a file with these rules as if it named GPT-2's
UNREAD = (_SMOLLM,)
_REMEDY = "Leave stage.gguf out for safetensors."


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the file says of tokens."""

    rules: str  # llama.cpp's name of the rules by which it splits texts
    tokens: tuple[str, ...]  # by their ids
    types: tuple[int, ...]  # gguf.TokenType of each
    merges: tuple[str, ...]
    special: dict[str, int]  # bos, eos, unk, pad, eot: ids
    adds_bos: bool  # whether llama.cpp puts bos before a text
    template: str | None


def vocabulary_of(tokenizer: Any, rows: int) -> Vocabulary:
    """The vocabulary of a byte-level BPE tokenizer for an embedding of `rows`. Raises UserError for
    other kinds, and for one that splits texts by rules that llama.cpp doesn't have.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if core is None else json.loads(core.to_str())
    rules = rules_of(content)
    model = content["model"]
    tokens, types = _entries(model["vocab"], content["added_tokens"], rows)
    template = tokenizer.chat_template
    if template is not None and not isinstance(template, str):
        raise UserError(
            f"stage.gguf: the tokenizer has several chat templates ({', '.join(template)}), and a "
            "GGUF file holds one. Save the model with one of them."
        )
    return Vocabulary(
        rules,
        tuple(tokens),
        tuple(types),
        tuple(_merge(merge) for merge in model["merges"]),
        _special(tokenizer),
        _adds_bos(tokenizer),
        template,
    )


# ---- rules ----


def rules_of(content: dict[str, Any]) -> str:
    """llama.cpp's name of the rules in a tokenizer.json. Raises UserError."""
    model = content.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece's BPE" if model.get("byte_fallback") else model.get("type")
        raise UserError(
            f"stage.gguf: tokenizers of the kind {kind} can't be written here, byte-level BPE "
            f"only. {_REMEDY}"
        )
    steps = _steps(content.get("pre_tokenizer"))
    rules = _rules_of_steps(steps)
    normalizer = content.get("normalizer")
    if rules is None or not _is_plain(normalizer, rules):
        shown = json.dumps({"normalizer": normalizer, "pre_tokenizer": steps}, ensure_ascii=False)
        raise UserError(
            "stage.gguf: llama.cpp has no rules by which this tokenizer splits texts, as far as "
            f"it is known here: {shown}. {_REMEDY}"
        )
    if bool(model.get("ignore_merges")) is not (rules in _WHOLE_WORDS):
        raise UserError(
            f"stage.gguf: ignore_merges={model.get('ignore_merges')} of the tokenizer is not what "
            f"llama.cpp does under the rules {rules}. {_REMEDY}"
        )
    return rules


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps that split a text, without what changes no token."""
    if pre_tokenizer is None:
        return []
    inner = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [{k: v for k, v in step.items() if k != "trim_offsets"} for step in inner]


def _rules_of_steps(steps: Sequence[dict[str, Any]]) -> str | None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    words = bytes_only | {"use_regex": True}
    if steps == [words]:
        return _GPT2
    if steps == [{"type": "Digits", "individual_digits": True}, words]:
        return _SMOLLM
    if len(steps) != 2 or steps[1] != bytes_only or steps[0].get("type") != "Split":
        return None
    if steps[0]["behavior"] != "Isolated" or steps[0]["invert"]:
        return None
    pattern = steps[0]["pattern"].get("Regex")
    for name in _BY_PATTERN:
        if GGUF_PRE_TOKENIZER_SPLITS[name] == pattern:
            return name
    return None


def _is_plain(normalizer: dict[str, Any] | None, rules: str) -> bool:
    """Whether llama.cpp does with a text what the normalizer does, for texts in composed form: all
    programs leave Qwen's NFC out.
    """
    return normalizer is None or (rules == "qwen2" and normalizer == {"type": "NFC"})


# ---- entries ----


def _entries(
    vocab: dict[str, int], added: Sequence[dict[str, Any]], rows: int
) -> tuple[list[str], list[int]]:
    """Tokens and their types for every row of the embedding; rows without a token get one that no
    text has.
    """
    import gguf

    kinds = gguf.TokenType
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [int(kinds.UNUSED)] * rows
    for token, i in vocab.items():
        if i < rows:
            tokens[i], types[i] = token, int(kinds.NORMAL)
    for entry in added:
        i = entry["id"]
        if i < rows:
            kind = kinds.CONTROL if entry["special"] else kinds.USER_DEFINED
            tokens[i], types[i] = entry["content"], int(kind)
    return tokens, types


def _merge(merge: str | Sequence[str]) -> str:
    """Two tokens with a blank between them; byte-level tokens hold none."""
    return merge if isinstance(merge, str) else " ".join(merge)


def _special(tokenizer: Any) -> dict[str, int]:
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    if tokenizer.chat_template is not None:
        ids["eot"] = habits(tokenizer).turn.end
    return {name: int(i) for name, i in ids.items() if i is not None}


def _adds_bos(tokenizer: Any) -> bool:
    """Whether bos is to stand before every text: the tokenizer puts it there, and the model's
    conversations begin with it, where there is a template. A template's own bos is text.
    """
    bos = tokenizer.bos_token_id
    if bos is None or bos not in habits(tokenizer).prefix:
        return False
    if tokenizer.chat_template is None:
        return True
    return prompt_ids(tokenizer, [{"role": "user", "content": "Hello"}])[:1] == [bos]


def write(writer: Any, vocabulary: Vocabulary) -> None:
    """Put the vocabulary into a file's header."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.rules)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for name, token in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)
