"""Losses of reward models, as pure functions. Training runs in TRL; these are the equations that tests and evaluation hold it to."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centering_coef: float = 0.0) -> Tensor:
    """Bradley-Terry loss of pairs, a scalar mean in nats (Ouyang et al. 2022, arXiv:2203.02155, equation 1).

        L = mean(-log sigmoid(chosen - rejected - margin)) + centering_coef * mean((chosen + rejected)^2)

    Margin: Llama 2 (arXiv:2307.09288, equation 2). Centring: Eisenstein et al. 2023 (arXiv:2312.09244, section 2), which fixes the free constant
    of the scores. `chosen`, `rejected`, `margin`: [B]. Raises ValueError on other shapes or an empty batch (whose mean would be NaN).
    """
    shapes = [tuple(t.shape) for t in (chosen, rejected, margin) if t is not None]
    if len(set(shapes)) != 1 or chosen.dim() != 1 or not len(chosen):
        raise ValueError(f"expected chosen, rejected and margin of one shape [B] with B >= 1, found {shapes}")
    chosen, rejected = chosen.float(), rejected.float()
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin
    loss = -logsigmoid(difference).mean()
    if centering_coef:
        loss = loss + centering_coef * (chosen + rejected).square().mean()
    return loss
