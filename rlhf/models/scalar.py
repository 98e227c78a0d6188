"""A head of one number on any causal language model: for families that transformers has no sequence
classifier for, or one whose head is not `score` on the last hidden states.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.types import UserError

_PREFIXED = ("cpmant",)
_ENDING = "ScalarHead"  # of the class's name, which config.json keeps as the architecture


def base_model(model: Any) -> Any:
    """The transformers model inside PEFT's, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def backbone_name(lm: Any) -> str:
    """The attribute of a language model or classifier that holds all of it but its head."""
    # Llama 4's text model calls it otherwise than its class says.
    return lm.base_model_prefix if lm.base_model_prefix in lm._modules else "model"


def one_label_config(
    weights: str, trust_remote_code: bool = False, gguf_file: str | None = None
) -> Any:
    """The configuration of a directory, a hub's model or a GGUF file, for a classifier."""
    from transformers import AutoConfig

    extra = {"gguf_file": gguf_file} if gguf_file else {}
    config = AutoConfig.from_pretrained(weights, trust_remote_code=trust_remote_code, **extra)
    config.num_labels = 1
    return config


def classifier_class(config: Any, trust_remote_code: bool = False) -> Any:
    """The class of a classifier of one label for a model's configuration: transformers' where that
    is a linear `score` on the last hidden states, else a `scalar_class`.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    names = getattr(config, "architectures", None) or [""]
    if config.model_type in _PREFIXED:
        raise UserError(
            f"{config.model_type} puts tokens of its own before each row and sees padding, so the "
            "last token of a row can't be read beside longer rows: it can be no reward model here."
        )
    with torch.device("meta"):
        if not names[0].endswith(_ENDING) and _has_classifier(config):
            theirs = AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=trust_remote_code
            )
            if isinstance(getattr(theirs, "score", None), nn.Linear):
                return type(theirs)
        causal = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    kind: Any = type(causal)
    return scalar_class(kind)


def _has_classifier(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    remote = getattr(config, "auto_map", None) or {}
    known = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    return known or "AutoModelForSequenceClassification" in remote


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32: half precision would round scores to a few
    hundredths.
    """

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias)


@functools.cache
def scalar_class(causal: Any) -> Any:
    """A classifier of one label made of a causal language model's class: its backbone under the
    same name, so that its weights load, and `score` [1, H] in float32 at the last token.
    """
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput

    family: Any = next(kind for kind in causal.__mro__[1:] if issubclass(kind, PreTrainedModel))

    class Classifier(family):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            whole = causal(config)
            self.num_labels = 1
            self.backbone_name = backbone_name(whole)
            setattr(self, self.backbone_name, whole._modules[self.backbone_name])
            self.score = Float32Linear(_width(whole), 1, bias=False)
            self.post_init()

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
        ) -> Any:
            """`input_ids` and `attention_mask` [B, L] -> logits [B, 1] float32, read at the last
            token of each row that the mask has.
            """
            options = {name: value for name, value in options.items() if name in _PASSED_ON}
            backbone = getattr(self, self.backbone_name)
            hidden = backbone(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options
            ).last_hidden_state  # [B, L, H]
            last = torch.full(input_ids.shape[:1], -1, device=hidden.device)
            if attention_mask is not None:
                columns = torch.arange(input_ids.shape[1], device=hidden.device)
                last = (attention_mask.to(hidden.device).long() * columns).argmax(dim=1)
            rows = torch.arange(len(input_ids), device=hidden.device)
            return SequenceClassifierOutput(logits=self.score(hidden[rows, last]))

    stem = causal.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    Classifier.__name__ = Classifier.__qualname__ = stem + _ENDING
    Classifier.__module__ = family.__module__  # transformers reads a family's abilities there
    return Classifier


def _width(whole: Any) -> int:
    """Of a model's last hidden states."""
    width = int(whole.config.get_text_config().hidden_size)
    head = whole.get_output_embeddings()
    # Reformer's hold two streams side by side
    return width if head is None else max(width, head.weight.shape[1])


_PASSED_ON = ("position_ids", "inputs_embeds")
