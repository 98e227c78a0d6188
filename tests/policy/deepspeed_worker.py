"""The gradient of one optimizer step of 512 micro-batches in bfloat16 under ZeRO, against float64:
`test_deepspeed` starts it. usage: python -m tests.policy.deepspeed_worker ZERO_STAGE OFFLOAD
"""

import sys

import torch
from torch import Tensor, nn

from conf.choices import EngineKind, Offload
from conf.schema import EngineConfig
from policy.engines.deepspeed import DeepSpeedEngine, prepare_cpu
from tests.policy.test_engine import OPTIM

ROWS, WIDTH = 512, 16


class Regression(nn.Module):
    """A linear layer, with the attributes by which an engine finds the hidden size."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(WIDTH, 1, bias=False)
        self.model.config = type("C", (), {"get_text_config": lambda s: s, "hidden_size": WIDTH})()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH).bfloat16()
    y = (x.float() @ torch.randn(WIDTH, 1) + 0.3).bfloat16()
    module = Regression().bfloat16()
    exact = module.model.weight.detach().double().requires_grad_()
    ((x.double() @ exact.T - y.double()) ** 2).mean().backward()
    assert exact.grad is not None
    prepare_cpu()
    cfg = EngineConfig(
        kind=EngineKind.deepspeed, zero_stage=int(sys.argv[1]), offload=Offload(sys.argv[2])
    )
    engine = DeepSpeedEngine(module, cfg, OPTIM, torch.device("cpu"), half=True)
    for row in range(ROWS):
        error = engine(x[row : row + 1]).float() - y[row : row + 1].float()
        engine.backward((error**2).sum() / ROWS, last=row == ROWS - 1)
    from deepspeed.utils import safe_get_full_grad

    gradient = safe_get_full_grad(module.model.weight).double()
    print("error", float((gradient - exact.grad).norm() / exact.grad.norm()))


if __name__ == "__main__":
    main()
