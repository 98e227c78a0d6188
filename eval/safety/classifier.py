"""A sequence classifier in a directory, such as one of toxicity or of refusals: the probability of
one of its labels.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf.types import UserError

_BATCH = 16  # texts
_SAYS_YES = ("toxic", "toxicity", "hate", "offensive", "refusal", "refused", "reject", "label_1")


class TextClassifier:
    """A classifier and the label whose probability is wanted."""

    def __init__(self, given: str, key: str) -> None:
        """`given`: DIR or DIR#LABEL, the value of the option `key`. Nothing loads yet.

        Raises UserError for no such directory or label, and where the label has to be named.
        """
        path, _, label = given.partition("#")
        self.path = Path(path).expanduser()
        if not (self.path / "config.json").is_file():
            raise UserError(
                f"{key}={given}: expected a directory with a classifier, no config.json"
            )
        from transformers import AutoConfig

        self._config = AutoConfig.from_pretrained(self.path, local_files_only=True)
        kinds = self._config.architectures or []
        if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
            shown = ", ".join(kinds) or "none"
            raise UserError(f"{key}={given}: expected a sequence classifier, found {shown}.")
        self.label = label_of(self._config.id2label, label, f"{key}={given}")

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(self.path, local_files_only=True)
        return tokenizer, model.eval()

    def probabilities(self, texts: Sequence[str]) -> list[float]:
        """The label's probability for each text. Labels that exclude each other share it; a
        classifier of one label, or of several at once (multi_label_classification), gives each its
        own. Texts are cut at the classifier's longest.
        """
        import torch

        tokenizer, model = self._loaded
        several = self._config.problem_type == "multi_label_classification"
        alone = len(self._config.id2label) == 1
        longest = getattr(self._config, "max_position_embeddings", None) or 512
        out: list[float] = []
        for start in range(0, len(texts), _BATCH):
            batch = [text or " " for text in texts[start : start + _BATCH]]
            encoded = tokenizer(
                batch,
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=min(longest, tokenizer.model_max_length),
            )
            with torch.inference_mode():
                logits = model(**encoded).logits.double()  # [B, labels]
            shares = logits.sigmoid() if several or alone else logits.softmax(-1)
            out += shares[:, self.label].tolist()
        return out


def label_of(labels: Mapping[int, str], wanted: str, given: str) -> int:
    """The number of the label `wanted`; of a classifier's own words where it is empty. Raises
    UserError that shows the labels.
    """
    known = {name.lower(): number for number, name in labels.items()}
    if wanted:
        found = [known[wanted.lower()]] if wanted.lower() in known else []
    else:
        found = [known[name] for name in _SAYS_YES if name in known]
        found = list(known.values()) if len(known) == 1 else found
    if len(found) != 1:
        raise UserError(f"{given}: name the label behind a #, one of {', '.join(labels.values())}.")
    return int(found[0])
