"""Who judges the responses of ``stage=eval``."""

from collections.abc import Sequence
from typing import Any

from conf.choices import Judge
from conf.schema import RewardConfig
from conf.stages import EvalStage
from eval.judges import ClassifierJudge, FunctionJudge, LexiconJudge, ResponseJudge
from reward.terms import make_scorer
from rlhf.checks import launch
from rlhf.data.files import check_file, read_rows
from rlhf.process import distributed
from rlhf.stages.evaluation.llm_judge import check_llm_judge
from rlhf.types import Rollout, Scorer, UserError


def check_judges(stage: EvalStage) -> None:
    """Every judge has what it judges by. Raises UserError."""
    if Judge.llm in stage.judges:
        check_llm_judge(stage.llm_judge)
    if Judge.classifier in stage.judges:
        if stage.judge_path is None:
            raise UserError(
                "stage.judges holds classifier, but stage.judge_path is not set: expected a file "
                "of labelled texts (text, label)."
            )
        check_file(stage.judge_path, "stage.judge_path")
    if Judge.function in stage.judges and stage.judge_function is None:
        raise UserError(
            "stage.judges holds function, but stage.judge_function is not set: expected "
            "pkg.module:function."
        )
    if Judge.lexicon in stage.judges and not launch.installed("vaderSentiment"):
        raise UserError(
            "stage.judges holds lexicon, which needs the package vaderSentiment: `pip install "
            "vaderSentiment`, or leave lexicon out."
        )


def make_judges(stage: EvalStage, tokenizer: Any) -> list[ResponseJudge]:
    """The judges of ``stage.judges`` that give each response a number, trained where they need it;
    llm compares (llm_judge.py). Raises UserError for one without what it judges by.
    """
    check_judges(stage)
    judges: list[ResponseJudge] = []
    for kind in stage.judges:
        if kind is Judge.llm:
            continue
        if kind is Judge.lexicon:
            judges.append(LexiconJudge())
        elif kind is Judge.classifier:
            assert stage.judge_path is not None
            rows = read_rows(stage.judge_path, key="stage.judge_path")
            judges.append(ClassifierJudge.from_rows(rows, f"stage.judge_path={stage.judge_path}"))
        else:
            scorer = make_scorer(
                RewardConfig(function=stage.judge_function),
                device=distributed.device(),
                policy_tokenizer=tokenizer,
            )
            judges.append(FunctionJudge(scorer))
    return judges


def judge_rollouts(
    rollouts: Sequence[Rollout], judges: Sequence[ResponseJudge], scorer: Scorer | None
) -> dict[str, list[float]]:
    """Judgements by name, in the order of `rollouts`; the scorer's are ``score``."""
    values = {} if scorer is None else {"score": scorer.score(rollouts).total}
    return values | {judge.name: judge.judge(rollouts) for judge in judges}
