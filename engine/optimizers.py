"""What moves the weights: Adam, as in the paper (S.2), Adam with its moments spread over processes, or Muon and Adam.

    adam = optimizers.build("adam", network, lr, betas)             # the paper's, and that of every table
    both = optimizers.build("muon", network, lr, betas)             # fewer iterations, each a little longer

Muon (Keller Jordan, 2024, https://kellerjordan.github.io/posts/muon/) moves a weight matrix along its momentum with all
singular values made equal. It serves the matrices inside the blocks; what reads or writes data (patches, tokens,
times, output) and all vectors stay with Adam. torch has one from 2.9 on, which takes its products in bf16 everywhere,
and that is slow on a processor without bf16 instructions. This one takes them in the network's precision, and in bf16
its steps are torch's to the last bit (tests/test_optimizers.py).
"""

import math

import torch
from torch import nn

OPTIMIZERS = {"adam": "Adam", "muon": "Muon and Adam"}  # --optimizer, and how the plan names it

MOMENTUM = 0.95
# An odd polynomial a x + b x^3 + c x^5. Five rounds take singular values from 0.0015 up to 0.68 .. 1.21; smaller ones
# grow by up to 485 times. Newton and Schulz's own, (15, -10, 3) / 8, needs more rounds for those. From Jordan's text.
ROUNDS, POLYNOMIAL = 5, (3.4445, -4.7750, 2.0315)


def orthogonal(matrices: torch.Tensor, precision: torch.dtype = torch.float32) -> torch.Tensor:
    """About U V^T for each of the matrices [k, m, n] = U S V^T, in `precision`, without a decomposition.

    Their singular values lie in 0.68 .. 1.21, but for those below 0.0015 of the matrix's norm.

    An odd polynomial of a matrix acts on its singular values alone: a X + b (X X^T) X + c (X X^T)^2 X.
    """
    a, b, c = POLYNOMIAL
    x = matrices.to(precision)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT  # X X^T is the smaller square
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above the Frobenius norm
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for matrices. A step's root mean square is 0.2 times the learning rate (less for
    momentum of low rank), which is what Adam's usually is (Liu et al., arXiv 2502.16982), so that both share one
    schedule."""

    def __init__(self, matrices, lr: float, precision: torch.dtype = torch.float32):
        super().__init__(matrices, {"lr": lr})
        self.precision = precision

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = {}  # matrices of one shape, multiplied together, faster than one by one
            for p in (p for p in group["params"] if p.grad is not None):
                alike.setdefault(p.shape, []).append(p)
            for shape, matrices in alike.items():
                gradients = [p.grad for p in matrices]
                buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in matrices]
                torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
                # Nesterov: with this gradient counted once more
                ahead = torch.stack(torch._foreach_lerp(gradients, buffers, MOMENTUM))
                moves = orthogonal(ahead, self.precision)
                size = 0.2 * math.sqrt(max(shape))  # their root mean square is 1 / sqrt(max)
                for p, move in zip(matrices, moves, strict=True):
                    p.add_(move, alpha=-group["lr"] * size)


def is_muons(name: str, p: torch.Tensor) -> bool:
    """Whether Muon moves the parameter: a matrix inside a block."""
    return p.dim() == 2 and "blocks." in name


class MuonAndAdam:
    """Two optimizers that are called like one."""

    def __init__(self, network: nn.Module, lr: float, betas: tuple[float, float]):
        matrices = [p for name, p in network.named_parameters() if is_muons(name, p)]
        others = [p for name, p in network.named_parameters() if not is_muons(name, p)]
        precision = getattr(network, "precision", torch.float32)
        self.parts = (Muon(matrices, lr, precision), torch.optim.Adam(others, lr=lr, betas=betas, fused=True))

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict:
        return {p: kept for part in self.parts for p, kept in part.state.items()}

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, kept in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(kept)


def build(name: str, network: nn.Module, lr: float, betas: tuple[float, float], zero: bool = False):
    """The optimizer called `name`; `zero` spreads Adam's moments over the processes (ZeRO-1)."""
    if name == "muon":
        return MuonAndAdam(network, lr, betas)
    choices = dict(lr=lr, betas=betas, fused=True)
    if zero:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # its import costs a second

        return ZeroRedundancyOptimizer(network.parameters(), torch.optim.Adam, **choices)
    return torch.optim.Adam(network.parameters(), **choices)


def moments(name: str, network: nn.Module) -> int:
    """How many numbers the optimizer keeps of `network`: Adam two of each parameter, Muon one of those it moves."""
    alone = [name == "muon" and is_muons(*named) for named in network.named_parameters()]
    return sum(p.numel() * (1 if one else 2) for p, one in zip(network.parameters(), alone))
