"""From the configuration to scorers: what each kind of reward term needs, which options it may not
have, who scores it, and what can be known of a reward before its weights load.

A new kind: a value of conf.choices.TermKind, its options in conf/reward.py and in `FIELDS`, then a
line in rlhf/stages/methods.py and one in `VERIFIED` where it compares a response with its row or a
pattern and scores in [0, 1] (a verifier), else, as for a penalty, a branch in `make_term` (a
scorer).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

import torch

from conf.choices import TermKind
from conf.online import WatchConfig
from conf.schema import RewardConfig, RewardTerm
from reward.base import Verifier, VerifierScorer, check_source, model_paths, read_reference
from reward.model import (
    Holder,
    check_tokenizers,
    load_reward_tokenizer,
    read_manifest,
    same_reading,
    template_hash,
)
from reward.scorers.computed import (
    CompositeScorer,
    FunctionScorer,
    LengthScorer,
    Term,
    load_function,
)
from reward.scorers.reward_model import EnsembleScorer, RewardModelScorer
from rlhf.types import Scorer, UserError

_COMMON = ("kind", "weight", "clip", "normalise")
FIELDS: dict[TermKind, tuple[str, ...]] = {
    TermKind.model: ("paths", "combine", "spread_coef"),
    TermKind.function: ("function",),
    TermKind.exact: ("column", "marker", "ignore_case", "ignore_punctuation"),
    TermKind.numeric: ("column", "marker", "tolerance"),
    TermKind.math: ("column",),
    TermKind.choice: ("column", "marker", "letters"),
    TermKind.regex: ("column", "pattern"),
    TermKind.json_schema: ("column", "marker", "schema_file"),
    TermKind.instructions: ("column", "all_or_nothing"),
    TermKind.code: ("column", "all_or_nothing", "time_limit_s", "memory_mb", "isolation"),
    TermKind.gym: ("column",),
    TermKind.length: ("low", "high", "ramp", "unit"),
    TermKind.format: ("pattern", "style"),
    TermKind.remote: ("url", "token_env", "timeout_s", "retries", "batch_size"),
    TermKind.environment: (),
}
"""The options that each kind reads beside `_COMMON`."""

VERIFIED = frozenset(
    (
        TermKind.exact,
        TermKind.numeric,
        TermKind.choice,
        TermKind.regex,
        TermKind.format,
        TermKind.json_schema,
        TermKind.math,
        TermKind.instructions,
        TermKind.code,
        TermKind.gym,
    )
)
"""The kinds that check a response against its row, or against a pattern."""

# What makes their verifiers, and scorers that only some runs need: rlhf/stages/methods.py fills
# both before any stage that scores.
VERIFIERS: dict[TermKind, Callable[[RewardTerm], Verifier]] = {}
SCORERS: dict[TermKind, Callable[[RewardTerm], Scorer]] = {}


def _default(option: Field[Any]) -> Any:
    if option.default_factory is not MISSING:
        return option.default_factory()
    return option.default


def check_fields(name: str, term: RewardTerm) -> None:
    """Raises UserError where an option is missing that the term's kind needs, or one is set that
    only other kinds read.
    """
    own = (*_COMMON, *FIELDS[term.kind])
    for option in fields(RewardTerm):
        if option.name not in own and getattr(term, option.name) != _default(option):
            readers = [kind.value for kind, names in FIELDS.items() if option.name in names]
            raise UserError(
                f"reward.terms.{name}.{option.name} is set, but kind={term.kind.value} doesn't "
                f"read it (its options: {', '.join(own)}). "
                f"Leave it out; kinds that read it: {', '.join(readers)}."
            )
    key = f"reward.terms.{name}"
    if term.kind is TermKind.model and not term.paths:
        raise UserError(
            f"{key}: kind=model needs paths, the directories of one or more reward models: "
            f"{key}.paths=[<a reward run>/model]."
        )
    if term.kind is TermKind.function and term.function is None:
        raise UserError(f"{key}: kind=function needs {key}.function=pkg.module:function.")
    if term.kind is TermKind.length and term.low is None and term.high is None:
        raise UserError(f"{key}: kind=length needs a band: {key}.low, {key}.high, or both.")
    if term.kind is TermKind.format and (term.pattern is None) == (term.style is None):
        found = "neither" if term.pattern is None else "both"
        raise UserError(f"{key}: kind=format needs {key}.style or {key}.pattern, found {found}.")
    if term.kind is TermKind.remote and term.url is None:
        raise UserError(
            f"{key}: kind=remote needs {key}.url=http://HOST:PORT/..., the address of a reward "
            "model."
        )


def make_verifier(name: str, term: RewardTerm) -> Verifier:
    """The verifier of a term. Raises UserError for a pattern or schema that doesn't compile, and
    for a missing package; RuntimeError before the verifiers were made known.
    """
    if term.kind not in VERIFIERS:
        raise RuntimeError(
            f"reward.terms.{name}: kind={term.kind.value} has no verifier, since "
            "rlhf/stages/methods.py did not register them"
        )
    try:
        return VERIFIERS[term.kind](term)
    except (ValueError, ImportError) as error:
        raise UserError(f"reward.terms.{name} (kind={term.kind.value}): {error}.") from error


def make_term(
    name: str,
    term: RewardTerm,
    reward_cfg: RewardConfig,
    *,
    device: torch.device,
    policy_tokenizer: Any,
    holder: Holder | None = None,
) -> Scorer:
    """The scorer of one term. Raises UserError for what its kind lacks."""
    check_fields(name, term)
    key = f"reward.terms.{name}"
    if term.kind in VERIFIED:
        return VerifierScorer(name, make_verifier(name, term))
    if term.kind is TermKind.model:
        options = {"policy_tokenizer": policy_tokenizer, "key": f"{key}.paths", "holder": holder}
        members = [RewardModelScorer(path, reward_cfg, device, **options) for path in term.paths]
        if len(members) == 1:
            return members[0]
        return EnsembleScorer(members, term.combine, term.spread_coef)
    if term.kind is TermKind.function:
        assert term.function is not None
        return FunctionScorer(term.function, f"{key}.function")
    if term.kind is TermKind.remote:
        from reward.scorers.remote import RemoteScorer  # loads httpx, which other kinds don't need

        return RemoteScorer(term, name, policy_tokenizer=policy_tokenizer)
    if term.kind is TermKind.length:
        return LengthScorer(term)
    if term.kind in SCORERS:
        return SCORERS[term.kind](term)
    raise NotImplementedError(f"reward.terms.{name}: kind={term.kind.value} has no scorer here")


def make_composite(
    reward_cfg: RewardConfig, *, training: bool = True, **options: Any
) -> CompositeScorer:
    """``reward.terms`` as one scorer; with `training` false no term is normalised. options: those
    of `make_term`.
    """
    terms = []
    for name, term in reward_cfg.terms.items():
        scorer = make_term(name, term, reward_cfg, **options)
        terms.append(
            Term(
                name,
                scorer,
                weight=term.weight,
                clip=term.clip,
                normalise=term.normalise and training,
            )
        )
    return CompositeScorer(terms)


def make_scorer(
    reward_cfg: RewardConfig,
    *,
    device: torch.device,
    policy_tokenizer: Any,
    training: bool = True,
    holder: Holder | None = None,
) -> Scorer:
    """The scorer that ``reward.path``, ``reward.function`` or ``reward.terms`` names. Raises
    UserError for none or several.

    With `training` false no term is normalised: its statistics would move from one call to the
    next, and scores have to be comparable. holder: how the ranks hold reward models together; None:
    each of them whole.
    """
    check_source(reward_cfg)
    if reward_cfg.terms:
        options = {"device": device, "policy_tokenizer": policy_tokenizer, "holder": holder}
        return make_composite(reward_cfg, training=training, **options)
    if reward_cfg.function is not None:
        return FunctionScorer(reward_cfg.function)
    assert reward_cfg.path is not None
    return RewardModelScorer(
        reward_cfg.path, reward_cfg, device, policy_tokenizer=policy_tokenizer, holder=holder
    )


def check_terms(reward_cfg: RewardConfig) -> None:
    """Check the terms before weights load: options, patterns, schemas, functions, packages. Raises
    UserError.
    """
    check_source(reward_cfg)
    for name, term in reward_cfg.terms.items():
        check_fields(name, term)
        key = f"reward.terms.{name}"
        if term.kind is TermKind.function:
            assert term.function is not None
            load_function(term.function, f"{key}.function")
        if term.kind is TermKind.remote:
            from rlhf.process.http import check_remote

            check_remote(term.url, term.token_env, key)
        if term.kind in VERIFIED:
            make_verifier(name, term)


def check_rows(reward_cfg: RewardConfig, rows: Sequence[tuple[str, Mapping[str, object]]]) -> None:
    """Check that `rows`, (how a message names the row, its columns), hold what the verifiers need.
    Raises UserError naming row, column and term.
    """
    for name, term in reward_cfg.terms.items():
        if term.kind in VERIFIED:
            verifier = make_verifier(name, term)
            for row_name, columns in rows:
                read_reference(name, verifier, columns, row_name)


def scoring_models(reward: RewardConfig, watch: WatchConfig) -> list[tuple[str, str]]:
    """(option, directory) of every reward model beside an online policy: those that score, and the
    judge of the watch.
    """
    paths = model_paths(reward)
    if watch.judge_path is not None:
        paths.append(("stage.watch.judge_path", watch.judge_path))
    return paths


def check_reward(reward: RewardConfig) -> None:
    """There is one source of scores, and its functions, fields and packages are there. Raises
    UserError.
    """
    check_terms(reward)
    if reward.function is not None:
        load_function(reward.function)


def check_reward_model(key: str, path: str, policy: Any, *, critic: bool = False) -> list[str]:
    """The directory `path` of the option `key` holds a reward model that can read what the policy
    writes. Returns a note where it reads texts, not the policy's tokens. Raises UserError.

    `policy` is the policy's tokenizer, None where it is not on the disk; the scorer compares again
    what it loaded. `critic`: the critic starts from this model, so it reads the policy's tokens.
    """
    manifest = read_manifest(path, key)
    if policy is None:
        return []
    tokenizer, _ = load_reward_tokenizer(path, key)
    check_tokenizers(path, tokenizer, manifest, policy, key)
    if critic:
        _check_critic(path, tokenizer, policy)
    return _reading_note(key, path, tokenizer, manifest, policy)


def _check_critic(path: str, tokenizer: Any, policy: Any) -> None:
    """The chat template has no part in what a critic reads, the vocabulary has."""
    if tokenizer.get_vocab() != policy.get_vocab():
        raise UserError(
            f"stage.critic_init=reward: the reward model {path} has another tokenizer "
            f"({len(tokenizer)} entries) than the policy "
            f"({len(policy)}), so its weights can't read the policy's tokens. Set "
            "stage.critic_init=policy."
        )


def _reading_note(key: str, path: str, tokenizer: Any, manifest: Any, policy: Any) -> list[str]:
    if not same_reading(manifest, policy):
        what = f"another tokenizer ({len(tokenizer)} entries) than the policy ({len(policy)})"
    elif template_hash(policy) != manifest.chat_template_hash and manifest.conversational:
        what = "another chat template than the policy"
    else:
        return []
    return [
        f"{key}={path}: the reward model has {what}, so prompts and responses go to it as text, "
        "which its own tokenizer and template put into tokens "
        "anew. To score the policy's own tokens, train it from the policy: stage=reward "
        "model.path=<the policy's model directory>."
    ]
