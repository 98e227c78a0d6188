"""What `back_translate` translates with: model directories, argostranslate's packages, or a
function of the user's.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from conf.preparation.augmentation import BackTranslate
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.data")
_PLACE = "step back_translate"


class Translator(Protocol):
    """Translates texts from one language into another. Languages are codes such as en, de, zh."""

    def translate(self, texts: Sequence[str], source: str, target: str) -> list[str]: ...


class ModelTranslator:
    """Sequence-to-sequence models from local directories, one for each direction; Marian's
    (opus-mt) need no more than their directory.

    Greedy, or with `beams`, so the same text always has the same translation. A text that is longer
    than the model's positions can't be translated whole and comes back empty, which the step
    counts.
    """

    def __init__(
        self,
        directories: dict[tuple[str, str], str],
        *,
        batch_size: int,
        max_new_tokens: int,
        beams: int,
    ) -> None:
        self.directories, self.batch_size, self.max_new_tokens, self.beams = (
            directories,
            batch_size,
            max_new_tokens,
            beams,
        )
        self._loaded: dict[tuple[str, str], tuple[Any, Any]] = {}
        for (source, target), directory in directories.items():
            if not (Path(directory).expanduser() / "config.json").is_file():
                raise UserError(
                    f"{_PLACE}: {source} to {target}: {directory} holds no config.json, so it is "
                    "not a model's directory."
                )

    def _model(self, direction: tuple[str, str]) -> tuple[Any, Any]:
        if direction not in self._loaded:
            import torch
            from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

            directory = str(Path(self.directories[direction]).expanduser())
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model, info = AutoModelForSeq2SeqLM.from_pretrained(directory, output_loading_info=True)
            if info["missing_keys"]:  # transformers would fill them with random numbers
                raise UserError(
                    f"{_PLACE}: {directory}: its weights lack "
                    f"{', '.join(sorted(info['missing_keys'])[:3])}, so it is not a whole model."
                )
            self._loaded[direction] = (
                AutoTokenizer.from_pretrained(directory),
                model.to(device).eval(),
            )
        return self._loaded[direction]

    def translate(self, texts: Sequence[str], source: str, target: str) -> list[str]:
        import torch

        tokenizer, model = self._model((source, target))
        limit = getattr(model.config, "max_position_embeddings", None)
        lengths = [len(ids) for ids in tokenizer(list(texts))["input_ids"]]
        fits = [i for i, length in enumerate(lengths) if limit is None or length <= limit]
        fits.sort(key=lengths.__getitem__)  # alike lengths together: less padding
        out = [""] * len(texts)
        if len(fits) < len(texts):
            LOG.warning(
                "%s: %d texts are longer than the %s tokens that the model from %s to %s reads",
                _PLACE,
                len(texts) - len(fits),
                limit,
                source,
                target,
            )
        for start in range(0, len(fits), self.batch_size):
            batch = fits[start : start + self.batch_size]
            inputs = tokenizer([texts[i] for i in batch], return_tensors="pt", padding=True).to(
                model.device
            )
            room = self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - 1)
            with torch.inference_mode():
                written = model.generate(
                    **inputs, do_sample=False, num_beams=self.beams, max_new_tokens=room
                )
            for i, text in zip(
                batch, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True
            ):
                out[i] = text
        return out


class ArgosTranslator:
    """argostranslate with the language packages that are installed in it; nothing is downloaded."""

    def __init__(self, directions: Sequence[tuple[str, str]]) -> None:
        try:
            translate = importlib.import_module("argostranslate.translate")
        except ImportError as error:
            raise UserError(
                f"{_PLACE}: translator=argos needs the package argostranslate, which the toolkit "
                "doesn't ask for: pip install argostranslate, and "
                "its language packages for both directions. Or use translator=model with two "
                "model directories."
            ) from error
        languages = {language.code: language for language in translate.get_installed_languages()}
        self._translations: dict[tuple[str, str], Any] = {}
        for source, target in directions:
            function = None
            if source in languages and target in languages:
                function = languages[source].get_translation(languages[target])
            if function is None:
                have = ", ".join(sorted(languages)) or "none"
                raise UserError(
                    f"{_PLACE}: translator=argos: no installed package from {source} to "
                    f"{target}. Languages that are installed: {have}."
                )
            self._translations[source, target] = function

    def translate(self, texts: Sequence[str], source: str, target: str) -> list[str]:
        return [str(self._translations[source, target].translate(text)) for text in texts]


class FunctionTranslator:
    """A function ``f(texts, source, target) -> texts``."""

    def __init__(self, spec: str) -> None:
        module, _, name = spec.partition(":")
        try:
            self.function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"{_PLACE}: translator={spec}: can't be loaded ({error}). Expected "
                "pkg.module:function that Python can import."
            ) from error
        self.spec = spec

    def translate(self, texts: Sequence[str], source: str, target: str) -> list[str]:
        out = self.function(list(texts), source, target)
        if (
            not isinstance(out, (list, tuple))
            or len(out) != len(texts)
            or not all(isinstance(text, str) for text in out)
        ):
            instead = f"{len(out)} values" if isinstance(out, (list, tuple)) else type(out).__name__
            raise UserError(
                f"{_PLACE}: translator={self.spec}: expected a list of {len(texts)} texts, found "
                f"{instead}."
            )
        return list(out)


def make_translator(options: BackTranslate) -> Translator:
    """The translator that the options name. Raises UserError for one that can't be loaded."""
    there, back = (options.source, options.pivot), (options.pivot, options.source)
    if options.translator == "argos":
        return ArgosTranslator([there, back])
    if options.translator != "model":
        return FunctionTranslator(options.translator)
    assert options.there is not None and options.back is not None
    return ModelTranslator(
        {there: options.there, back: options.back},
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        beams=options.beams,
    )
