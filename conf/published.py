"""Learning rates that papers and their authors' recipes report for models of 1B to 8B parameters.

A learning rate that is left out becomes the value here for the stage's method and for what trains:
all weights, or a low-rank adapter. A dry run compares a rate that was given with the range.

Looked up on 2026-11-29 in public configurations: alignment-handbook (recipes/zephyr-7b-beta,
recipes/mistral-capybara), open-instruct (docs/tulu3.md, scripts/train/tulu3), OpenRLHF
(examples/scripts), verl (examples/ppo_trainer, remax_trainer), SimPO (README), HALOs
(config/config.yaml), ORPO (scripts), DPO (config/config.yaml), summarize_from_feedback_details
(sbatches), TRL (docs/source, examples/scripts); and in copies of the papers' text for LIMA,
Llama 2, InstructGPT, DeepSeekMath, DAPO and QLoRA. 1.5e-5 of Stiennon et al. was read in a text
that follows them.
"""

from dataclasses import dataclass

from conf.choices import AdapterKind, Advantage
from conf.online import OnlineStage
from conf.training import TrainStage


@dataclass(frozen=True, slots=True)
class Published:
    """A learning rate, the range of published rates, and where they stand."""

    value: float
    low: float
    high: float
    source: str


# The rate of full training times about ten: Schulman et al. 2025, "LoRA Without Regret", whose
# sweeps put the best rate of LoRA at ten times that of full training, for SFT and for RL.
_TEN_TIMES = "ten times the rate of full training (Schulman et al. 2025, LoRA Without Regret)"

FULL: dict[str, Published] = {
    "sft": Published(
        1e-5,
        2e-6,
        2e-5,
        "LIMA (arXiv:2305.11206) 1e-5, Llama 2 (arXiv:2307.09288) and Zephyr 7B "
        "(arXiv:2310.16944) 2e-5, Tulu 3 (arXiv:2411.15124) 5e-6 at 8B, 2e-6 at 70B",
    ),
    "reward": Published(
        1e-5,
        3e-6,
        1.5e-5,
        "Llama 2 (arXiv:2307.09288) 1e-5, InstructGPT (arXiv:2203.02155) and OpenRLHF's Llama 3 8B "
        "9e-6, Tulu 3 8B (arXiv:2411.15124) 3e-6, Stiennon et al. (arXiv:2009.01325) 1.5e-5",
    ),
    "dpo": Published(
        5e-7,
        2e-7,
        1e-6,
        "Zephyr 7B (arXiv:2310.16944), the code of Rafailov et al. (arXiv:2305.18290) and Tulu 3 "
        "8B (arXiv:2411.15124) 5e-7, Tulu 3 70B 2e-7, SimPO's search (arXiv:2405.14734) 3e-7 to "
        "1e-6",
    ),
    "kto": Published(
        5e-7,
        5e-7,
        5e-6,
        "Ethayarajh et al. (arXiv:2402.01306): 5e-6 in their code, 5e-7 to 5e-6 in their advice "
        "for TRL; OpenRLHF's Llama 3 8B 5e-7",
    ),
    "cpo": Published(
        6e-7, 3e-7, 1e-6, "SimPO (arXiv:2405.14734): 6e-7 for Llama 3 8B, searched 3e-7 to 1e-6"
    ),
    "orpo": Published(
        8e-6,
        5e-6,
        8e-6,
        "Hong et al. (arXiv:2403.07691): 5e-6 in their script for Mistral 7B; TRL's example 8e-6",
    ),
    "ppo": Published(
        1e-6,
        1e-7,
        3e-6,
        "Llama 2 (arXiv:2307.09288), DeepSeekMath (arXiv:2402.03300) and DAPO (arXiv:2503.14476) "
        "1e-6, Huang et al. (arXiv:2403.17031) 3e-6, OpenRLHF's Llama 3 8B 5e-7, Tulu 3 "
        "(arXiv:2411.15124) 3e-7 at 8B, 1e-7 at 70B",
    ),
    "critic": Published(
        9e-6,
        5e-6,
        1e-5,
        "InstructGPT (arXiv:2203.02155) 9e-6 at 1.3B and 6B, 5e-6 at 175B; OpenRLHF's Llama 3 8B "
        "9e-6, verl's 7B examples 1e-5",
    ),
}

LOW_RANK: dict[str, Published] = {
    "sft": Published(2e-4, 1e-4, 2e-4, "QLoRA (arXiv:2305.14314) 2e-4 to 13B, 1e-4 above"),
    "reward": Published(1e-4, 3e-5, 1.5e-4, _TEN_TIMES),
    "dpo": Published(
        5e-6, 2e-6, 1e-5, f"Zephyr 7B with QLoRA (alignment-handbook) 5e-6; {_TEN_TIMES}"
    ),
    "kto": Published(5e-6, 5e-6, 5e-5, _TEN_TIMES),
    "cpo": Published(6e-6, 3e-6, 1e-5, _TEN_TIMES),
    "orpo": Published(8e-5, 5e-5, 8e-5, f"TRL's example 8e-5; {_TEN_TIMES}"),
    "ppo": Published(
        1e-5, 1e-6, 3e-5, f"1e-5 in TRL's reproduction of LoRA Without Regret; {_TEN_TIMES}"
    ),
    "critic": Published(9e-5, 5e-5, 1e-4, _TEN_TIMES),
}

# Methods that train scales or angles, whose rates are far from those of low-rank matrices: by stage
# what is published, and nothing where a rate has to be given.
OWN: dict[AdapterKind, dict[str, Published]] = {
    AdapterKind.ia3: {
        "sft": Published(
            3e-3,
            3e-3,
            5e-3,
            "the code of Liu et al. (arXiv:2205.05638, configs/ia3.json) 3e-3 for T0, PEFT's "
            "comparison of methods on Llama 3.2 3B (method_comparison/MetaMathQA) 5e-3",
        ),
    },
    AdapterKind.prompt: {
        "sft": Published(
            1e-3,
            1e-3,
            1e-3,
            "PEFT's comparison of methods on Llama 3.2 3B (method_comparison/MetaMathQA) 1e-3 with "
            "AdamW; Lester et al. (arXiv:2104.08691) 0.3 with Adafactor",
        ),
    },
    AdapterKind.ptuning: {
        "sft": Published(
            1e-4,
            1e-4,
            5e-4,
            "PEFT's comparison of methods on Llama 3.2 3B (method_comparison/MetaMathQA) 1e-4 with "
            "layers, 5e-4 with an LSTM",
        ),
    },
    AdapterKind.prefix: {
        "sft": Published(
            5e-3,
            1e-3,
            7e-3,
            "the code of P-tuning v2 (arXiv:2110.07602, run_script) 5e-3 for SQuAD and RTE, 7e-3 "
            "for BoolQ; PEFT's comparison of methods on Llama 3.2 3B 1e-3 and 5e-3",
        ),
    },
    AdapterKind.vera: {},
    AdapterKind.oft: {},
}

# The stage dataclass's own name in the tables, where it is another.
_METHODS = {
    "SFTStage": "sft",
    "RewardStage": "reward",
    "PreferenceStage": "dpo",
    "KTOStage": "kto",
    "CPOStage": "cpo",
    "ORPOStage": "orpo",
    "OnlineStage": "ppo",
}


def published(stage: TrainStage, adapter: AdapterKind) -> Published | None:
    """What is published for the policy (or reward model) of a stage; None where nothing is."""
    table = FULL if adapter is AdapterKind.none else LOW_RANK
    return OWN.get(adapter, table).get(_METHODS[type(stage).__name__])


def published_critic(stage: OnlineStage) -> Published:
    """What is published for a critic, which trains low-rank only with stage.critic_adapter."""
    return (LOW_RANK if stage.critic_adapter else FULL)["critic"]


def learning_rate(stage: TrainStage, adapter: AdapterKind) -> float:
    """The stage's learning rate; the published one where it is not set. Raises ValueError, whose
    message names the option, where none is published.
    """
    if stage.learning_rate is not None:
        return stage.learning_rate
    known = published(stage, adapter)
    if known is None:
        raise ValueError(
            f"stage.learning_rate is not set, and for adapter.kind={adapter.value} in "
            f"stage={stage.name} none is published. Give one: such methods train at 1e-3 and above."
        )
    return known.value


def critic_learning_rate(stage: OnlineStage) -> float:
    """The critic's learning rate; the published one where it is not set."""
    if stage.critic_learning_rate is not None:
        return stage.critic_learning_rate
    return published_critic(stage).value


def fill(stage: object, adapter: AdapterKind) -> None:
    """Set the learning rates that a training stage leaves out."""
    if isinstance(stage, TrainStage):
        stage.learning_rate = learning_rate(stage, adapter)
    if isinstance(stage, OnlineStage):
        stage.critic_learning_rate = critic_learning_rate(stage)


def taken(stage: object, adapter: AdapterKind) -> str:
    """The learning rates that a stage trains with, and for what; "" for other stages."""
    if not isinstance(stage, TrainStage):
        return ""
    what = "all weights" if stage.train.everything else "the weights of stage.train"
    if adapter is not AdapterKind.none:
        what = f"adapter={adapter.value}"
    text = f"stage.learning_rate={learning_rate(stage, adapter):g} for {what}"
    if isinstance(stage, OnlineStage) and stage.advantage is Advantage.gae:
        rate = critic_learning_rate(stage)
        text += f", stage.critic_learning_rate={rate:g}"
    return text


def _note(key: str, rate: float | None, known: Published, what: str) -> str | None:
    if rate is None or known.low <= rate <= known.high:
        return None
    return (
        f"{key}={rate:g} is outside the published range for {what}, {known.low:g} to "
        f"{known.high:g}: {known.source}."
    )


def outside_range(stage: object, adapter: AdapterKind) -> list[str]:
    """A sentence for each learning rate that lies outside the published range."""
    if not isinstance(stage, TrainStage):
        return []
    what = "full weights" if adapter is AdapterKind.none else f"adapter={adapter.value}"
    known = published(stage, adapter)
    notes = []
    if known is not None:
        notes.append(_note("stage.learning_rate", stage.learning_rate, known, what))
    if isinstance(stage, OnlineStage) and stage.advantage is Advantage.gae:
        critic = published_critic(stage)
        notes.append(
            _note("stage.critic_learning_rate", stage.critic_learning_rate, critic, "a critic")
        )
    return [note for note in notes if note is not None]
