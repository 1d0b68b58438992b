"""What moves the weights: Adam, as in the paper (S.2), Adam with its moments spread over processes, or Muon and Adam.

    adam = optimizers.build("adam", network, plan)                  # the paper's, and that of every table
    both = optimizers.build("muon", network, plan)                  # fewer iterations, each a little longer

Muon (Keller Jordan, 2024; in torch from 2.9 on) moves a weight matrix along its momentum with all singular values made
equal. It serves the matrices inside the blocks; what reads or writes data (patches, tokens, times, output) and all
vectors stay with Adam. Its step is scaled so that the root mean square of an update is Adam's usual 0.2 times the
learning rate (Liu et al., arXiv 2502.16982), so both share one schedule.
"""

import torch
from torch import nn

from engine import errors

OPTIMIZERS = ("adam", "muon")


class MuonAndAdam:
    """Two optimizers that are called like one. Raises UserError where torch has no Muon."""

    def __init__(self, network: nn.Module, lr: float, betas: tuple[float, float]):
        if not hasattr(torch.optim, "Muon"):
            raise errors.UserError(f"--optimizer muon needs torch 2.9 or newer, and this is {torch.__version__}: "
                                   "update it, or take adam")
        matrices = [p for name, p in network.named_parameters() if p.dim() == 2 and "blocks." in name]
        inside = set(matrices)
        others = [p for p in network.parameters() if p not in inside]
        self.parts = (torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
                      torch.optim.Adam(others, lr=lr, betas=betas, fused=True))  # fmt: skip

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict:
        return {p: own for part in self.parts for p, own in part.state.items()}

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)


def build(name: str, network: nn.Module, lr: float, betas: tuple[float, float], zero: bool = False):
    """The optimizer called `name`; `zero` spreads Adam's moments over the processes (ZeRO-1)."""
    if name == "muon":
        return MuonAndAdam(network, lr, betas)
    choices = dict(lr=lr, betas=betas, fused=True)
    if zero:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # its import costs a second

        return ZeroRedundancyOptimizer(network.parameters(), torch.optim.Adam, **choices)
    return torch.optim.Adam(network.parameters(), **choices)
