"""From ``reward.terms`` to scorers: what each kind needs, what it may not have, and who
scores it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch

from conf.choices import TermKind
from conf.schema import RewardConfig, RewardTerm
from reward.compose import CompositeScorer, Term
from reward.ensemble import EnsembleScorer
from reward.scorer import FunctionScorer, RewardModelScorer, check_source, load_function
from reward.shape import LengthScorer
from reward.verifiers import VERIFIED, make_verifier
from reward.verify import VerifierScorer, read_reference
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
}
"""The fields that each kind reads beside `_COMMON`."""


def check_fields(name: str, term: RewardTerm) -> None:
    """The term has what its kind needs and nothing that only other kinds read. Raises UserError."""
    own = (*_COMMON, *FIELDS[term.kind])
    for f in fields(RewardTerm):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if f.name not in own and getattr(term, f.name) != default:
            readers = ", ".join(kind.value for kind, names in FIELDS.items() if f.name in names)
            raise UserError(
                f"reward.terms.{name}.{f.name} is set, but kind={term.kind.value} doesn't read "
                f"it (its options: {', '.join(own)}). "
                f"Leave it out; kinds that read it: {readers}."
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


def make_term(
    name: str,
    term: RewardTerm,
    reward_cfg: RewardConfig,
    *,
    device: torch.device,
    policy_tokenizer: Any,
) -> Scorer:
    """The scorer of one term. Raises UserError for what its kind lacks."""
    check_fields(name, term)
    key = f"reward.terms.{name}"
    if term.kind is TermKind.model:
        members = [
            RewardModelScorer(
                path, reward_cfg, device, policy_tokenizer=policy_tokenizer, key=f"{key}.paths"
            )
            for path in term.paths
        ]
        return (
            members[0]
            if len(members) == 1
            else EnsembleScorer(members, term.combine, term.spread_coef)
        )
    if term.kind is TermKind.function:
        assert term.function is not None
        return FunctionScorer(term.function, f"{key}.function")
    if term.kind is TermKind.remote:
        from reward.remote import RemoteScorer

        return RemoteScorer(term, name, policy_tokenizer=policy_tokenizer)
    if term.kind is TermKind.length:
        return LengthScorer(term)
    return VerifierScorer(name, make_verifier(name, term))


def make_composite(
    reward_cfg: RewardConfig, *, device: torch.device, policy_tokenizer: Any, training: bool = True
) -> CompositeScorer:
    """``reward.terms`` as one scorer; without `training` nothing is normalised."""
    terms = []
    for name, term in reward_cfg.terms.items():
        scorer = make_term(name, term, reward_cfg, device=device, policy_tokenizer=policy_tokenizer)
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


def check_terms(reward_cfg: RewardConfig) -> None:
    """For preflight, before weights load: fields, patterns, schemas, functions, packages. Raises
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
            from reward.remote import check_remote

            check_remote(term, key)
        if term.kind in VERIFIED:
            make_verifier(name, term)


def check_rows(reward_cfg: RewardConfig, rows: Sequence[tuple[str, Mapping[str, object]]]) -> None:
    """For preflight: the rows (place in the data, columns) have what the verifiers need. Raises
    UserError naming row, column and term.
    """
    for name, term in reward_cfg.terms.items():
        if term.kind in VERIFIED:
            verifier = make_verifier(name, term)
            for place, columns in rows:
                read_reference(name, verifier, columns, place)


def model_paths(reward_cfg: RewardConfig) -> list[tuple[str, str]]:
    """(option, directory) of every reward model that scores: ``reward.path`` and those of the
    terms.
    """
    out = [] if reward_cfg.path is None else [("reward.path", reward_cfg.path)]
    return out + [
        (f"reward.terms.{name}.paths", path)
        for name, term in reward_cfg.terms.items()
        for path in term.paths
    ]
