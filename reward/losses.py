"""Losses of reward models, as pure functions. Training runs in TRL; these are the equations that
tests and evaluation hold it to.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    centering_coef: float = 0.0,
    soft_label: Tensor | None = None,
) -> Tensor:
    """Bradley-Terry loss of pairs, a scalar mean in nats (Ouyang et al. 2022, arXiv:2203.02155,
    equation 1).

        L = mean(-log sigmoid(chosen - rejected - margin)) + centering_coef * mean((chosen +
        rejected)^2)

    Margin: Llama 2 (arXiv:2307.09288, equation 2). Centring: Eisenstein et al. 2023
    (arXiv:2312.09244, section 2), which fixes the free constant of the scores. With `soft_label` p,
    the probability that chosen is better, the first term is the cross-entropy between p and what
    the scores say of it (Christiano et al. 2017, arXiv:1706.03741, section 2.2.3), least where
    chosen - rejected = log(p / (1 - p)):

        mean(-(p log sigmoid(chosen - rejected) + (1 - p) log sigmoid(rejected - chosen)))

    `chosen`, `rejected`, `margin`, `soft_label`: [B]. Raises ValueError on other shapes, an empty
    batch (whose mean would be NaN), a soft label outside [0, 1], and margin and soft label
    together.
    """
    shapes = [tuple(t.shape) for t in (chosen, rejected, margin, soft_label) if t is not None]
    if len(set(shapes)) != 1 or chosen.dim() != 1 or not len(chosen):
        raise ValueError(
            "expected chosen, rejected, margin and soft_label of one shape [B] with B >= 1, "
            f"found {shapes}"
        )
    if soft_label is not None and (
        margin is not None or not bool(((soft_label >= 0) & (soft_label <= 1)).all())
    ):
        raise ValueError("expected soft labels in [0, 1], and no margin beside them")
    chosen, rejected = chosen.float(), rejected.float()
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin
    loss = -logsigmoid(difference)
    if soft_label is not None:
        loss = soft_label * loss - (1 - soft_label) * logsigmoid(-difference)
    loss = loss.mean()
    if centering_coef:
        loss = loss + centering_coef * (chosen + rejected).square().mean()
    return loss
