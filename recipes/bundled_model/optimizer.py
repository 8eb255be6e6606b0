"""Muon for the weight matrices: momentum whose update is orthogonalised by a Newton-Schulz iteration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonalise(matrices: Tensor) -> Tensor:
    """Moves the singular values of a stack of matrices towards one (five quintic Newton-Schulz steps)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Muon with Nesterov momentum and decoupled weight decay; matrices of one shape are updated as a stack."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.02) -> None:
        self.lr, self.momentum, self.decay = lr, momentum, decay
        groups: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            groups[parameter.shape].append(parameter)
        self.groups = [(group, torch.zeros_like(torch.stack(group))) for group in groups.values()]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Updates the parameters from their gradients at `scale` times the learning rate."""
        rate = self.lr * scale
        for parameters, velocity in self.groups:
            gradient = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None])
            velocity.lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(velocity, self.momentum))
            rows, columns = update.shape[-2:]
            factor = rate * max(1.0, rows / columns) ** 0.5
            for parameter, change in zip(parameters, update.unbind(), strict=True):
                parameter.mul_(1 - rate * self.decay).sub_(change, alpha=factor)
