"""A version as a model directory of MLflow, written without the package: ``mlflow.transformers``
and ``mlflow models`` of a machine that has it load the directory.

The layout is MLflow's documented one (MLflow Model Format): MLmodel, a YAML with the flavors,
beside the files; requirements.txt and python_env.yaml name what loading needs. The flavor is
transformers with the task text-generation, the model's files in model/, the tokenizer's in
components/tokenizer/.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.models.directories import contents
from rlhf.registry.records import Figure, Version
from rlhf.types import UserError

MLMODEL = "MLmodel"
_TASK = "text-generation"
_REQUIRED = ("torch", "transformers", "accelerate")
_TOKENIZER = ("token", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")


def write(version: Version, figures: Mapping[str, Figure], folder: Path) -> None:
    """Write a version's directory of MLflow to `folder`, which must not exist. Raises UserError for
    an adapter, which MLflow's flavor would load from its base alone.
    """
    held = contents(version.draft.path)
    if held.adapters or not held.has_config:
        raise UserError(
            f"{version.label} is an adapter or a GGUF file: MLflow's flavor transformers loads "
            f"whole weights. stage=export model.path={version.draft.path} merges it; register "
            "what it writes."
        )
    if folder.exists():
        raise UserError(f"stage.folder={folder} exists. Choose another, or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(version, figures, beside)
        beside.chmod(0o755)
        os.rename(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _write(version: Version, figures: Mapping[str, Figure], folder: Path) -> None:
    import yaml

    source = Path(version.draft.path)
    for file in version.draft.files:
        for place in _places(file.path):
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file.path, target)
    requirements = [f"{name}=={importlib.metadata.version(name)}" for name in _REQUIRED]
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    environment = {
        "python": platform.python_version(),
        "build_dependencies": ["pip"],
        "dependencies": ["-r requirements.txt"],
    }
    _dump(folder / "python_env.yaml", environment, yaml)
    _dump(folder / MLMODEL, _description(version, figures, folder), yaml)


def _places(inside: str) -> list[str]:
    """Where a file of the model goes: weights into model/, what the tokenizer reads into its
    component; config.json is read by both.
    """
    of_tokenizer = inside.startswith(_TOKENIZER)
    places = [f"components/tokenizer/{inside}"] if of_tokenizer or inside == "config.json" else []
    return places if of_tokenizer else [*places, f"model/{inside}"]


def _description(version: Version, figures: Mapping[str, Figure], folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    flavor = {
        "code": None,
        "components": ["tokenizer"],
        "framework": "pt",
        "instance_type": "TextGenerationPipeline",
        "model_binary": "model",
        "pipeline_model_type": (config.get("architectures") or ["unknown"])[0],
        "source_model_name": version.draft.name,
        "task": _TASK,
        "tokenizer_type": _tokenizer_class(folder),
        "transformers_version": importlib.metadata.version("transformers"),
    }
    return {
        "artifact_path": version.draft.name,
        "flavors": {
            "python_function": {
                "loader_module": "mlflow.transformers",
                "model_binary": "model",
                "python_version": platform.python_version(),
                "env": {"virtualenv": "python_env.yaml"},
            },
            "transformers": flavor,
        },
        "metadata": {
            "version": version.label,
            "digest": version.draft.digest,
            "figures": {name: figure.value for name, figure in sorted(figures.items())},
            "ancestors": list(version.draft.lineage.get("ancestors", [])),
        },
        "model_size_bytes": size,
        "model_uuid": uuid.uuid4().hex,
        "utc_time_created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
    }


def _tokenizer_class(folder: Path) -> str:
    path = folder / "components" / "tokenizer" / "tokenizer_config.json"
    if not path.is_file():
        return "PreTrainedTokenizerFast"
    name = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")
    return str(name or "PreTrainedTokenizerFast")


def _dump(path: Path, content: Mapping[str, Any], yaml: Any) -> None:
    path.write_text(yaml.safe_dump(dict(content), sort_keys=True), encoding="utf-8")
