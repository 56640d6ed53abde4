"""AdamW whose parameters may change shape: surviving components keep their moments, new ones start
as at step 1.

torch.optim.AdamW keeps one step count per parameter. After a resize that count would be wrong for
new components: with zero moments and hardly any bias correction left, their first updates would be
up to six times the learning rate. So this AdamW keeps the count per component (Adam: arXiv
1412.6980; decoupled decay: arXiv 1711.05101).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.compat import foreach, fused_adamw
from lorakit.kernels.masks import zero_masked


@dataclass
class ParamGroup:
    """Parameters that share their settings.

    lr: the group's own learning rate, constant over the run, or None for the run's scheduled one
    times `lr_factor`; weight_decay: None for the run's; clipped: True if gradient clipping counts
    and scales the group's gradients.
    """

    params: list[nn.Parameter]
    lr: float | None = None
    lr_factor: float = 1.0
    weight_decay: float | None = None
    clipped: bool = True


@dataclass
class Moments:
    """The state of one parameter: Adam's moments, and values of a method that must be resized and
    saved with them.

    `age` counts the updates and broadcasts against the parameter: [] or one count per component.
    `mask`: True where entries may be non-zero; None if all may. `sensitivity`: a running score of
    each entry, or None; `uncertainty`: a running distance of new scores from it, or None.
    """

    first: Tensor
    second: Tensor
    age: Tensor
    mask: Tensor | None = None
    sensitivity: Tensor | None = None
    uncertainty: Tensor | None = None


class AdamW:
    """AdamW over `ParamGroup`s (Loshchilov and Hutter, arXiv 1711.05101). Equal to torch's when
    nothing is resized."""

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.groups = list(groups)
        self.weight_decay, self.betas, self.eps = weight_decay, betas, eps
        self._fused = fused_adamw()
        self.state: dict[Tensor, Moments] = {
            p: Moments(torch.zeros_like(p), torch.zeros_like(p), torch.zeros([], device=p.device))
            for g in self.groups
            for p in g.params
        }

    def parameters(self) -> list[nn.Parameter]:
        """All parameters, group by group."""
        return [parameter for group in self.groups for parameter in group.params]

    def zero_grad(self) -> None:
        for parameter in self.state:
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Make one update with the scheduled learning rate `lr`. Parameters without a gradient or
        without entries are skipped."""
        beta1, beta2 = self.betas
        for group in self.groups:
            rate = group.lr if group.lr is not None else lr * group.lr_factor
            decay = self.weight_decay if group.weight_decay is None else group.weight_decay
            params: list[Tensor] = [p for p in group.params if p.grad is not None and p.numel()]
            # Parameters that were never resized have one age, so torch's own kernel can update
            # them.
            if plain := [p for p in params if self.state[p].age.ndim == 0]:
                grads, first, second, ages = self._parts(plain)
                foreach.add_(ages, 1.0)
                nothing: list[Tensor] = []
                lists = plain, grads, first, second, nothing, ages
                self._fused(
                    *lists,
                    lr=rate,
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=decay,
                    eps=self.eps,
                    amsgrad=False,
                    maximize=False,
                )
            if resized := [p for p in params if self.state[p].age.ndim > 0]:
                grads, first, second, ages = self._parts(resized)
                foreach.add_(ages, 1.0)
                foreach.lerp_(first, grads, 1 - beta1)
                foreach.mul_(second, beta2)
                foreach.addcmul_(second, grads, grads, 1 - beta2)
                # 1 - beta^age for each component, so that new ones get the correction of a first
                # step.
                correction1 = [1 - beta1**age for age in ages]
                correction2 = [(1 - beta2**age).sqrt_() for age in ages]
                if decay:
                    foreach.mul_(resized, 1 - rate * decay)
                denominator = foreach.sqrt(second)
                foreach.div_(denominator, correction2)
                foreach.add_(denominator, self.eps)
                foreach.mul_(denominator, correction1)
                foreach.addcdiv_(resized, first, denominator, -rate)

    def _parts(
        self, params: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """(gradients, first moments, second moments, ages) of parameters that have gradients."""
        states = [self.state[p] for p in params]
        grads = [p.grad for p in params if p.grad is not None]
        return (
            grads,
            [state.first for state in states],
            [state.second for state in states],
            [state.age for state in states],
        )

    @torch.no_grad()
    def resize(self, module: nn.Module, name: str, dim: int, keep: Tensor, new: Tensor) -> None:
        """Keep the components `keep` [kept] of `module`'s parameter `name` along `dim` and append
        `new`.

        Kept components keep their moments. The parameter is replaced by a new object, in the
        module and here, since autograd remembers the old one's shape for as long as any graph of it
        lives.
        """
        old = getattr(module, name)
        moments = self.state.pop(old)
        keep, new = keep.to(old.device), new.to(old)
        nothing = torch.zeros_like(new)
        shape = [1] * old.ndim
        shape[dim] = old.shape[dim]
        age = moments.age.expand(shape).index_select(dim, keep)
        shape[dim] = new.shape[dim]
        parameter = nn.Parameter(torch.cat([old.index_select(dim, keep), new], dim))
        setattr(module, name, parameter)
        for group in self.groups:
            group.params = [parameter if p is old else p for p in group.params]

        def kept(tensor: Tensor, of_new: Tensor) -> Tensor:
            return torch.cat([tensor.index_select(dim, keep), of_new], dim)

        def kept_if_there(tensor: Tensor | None, of_new: Tensor) -> Tensor | None:
            return None if tensor is None else kept(tensor, of_new)

        self.state[parameter] = Moments(
            first=kept(moments.first, nothing),
            second=kept(moments.second, nothing),
            age=torch.cat([age, age.new_zeros(shape)], dim),
            mask=kept_if_there(moments.mask, torch.ones_like(nothing, dtype=torch.bool)),
            sensitivity=kept_if_there(moments.sensitivity, nothing),
            uncertainty=kept_if_there(moments.uncertainty, nothing),
        )

    @torch.no_grad()
    def mask(self, masks: Mapping[nn.Parameter, Tensor]) -> None:
        """Set the entries of each parameter where its mask is False, and their moments, to exactly
        zero.

        They stay zero as long as their gradients are zero (`mask_gradients`), since zero moments
        give a zero update.
        """
        tensors, by = [], []
        for parameter, mask in masks.items():
            state = self.state[parameter]
            state.mask = mask
            tensors += [parameter, state.first, state.second]
            by += [mask] * 3
        zero_masked(tensors, by)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of masked entries to zero; call it before clipping, which must not
        count them."""
        masked = [
            (p.grad, state.mask)
            for p, state in self.state.items()
            if p.grad is not None and state.mask is not None
        ]
        zero_masked([grad for grad, _ in masked], [mask for _, mask in masked])

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Scale the gradients of clipped groups down to `max_norm` if their norm is larger. Returns
        the norm before clipping.

        Gradients outside the clipped groups count only if they are not finite, so that the norm
        shows it.
        """
        clipped = [
            p.grad
            for g in self.groups
            for p in g.params
            if g.clipped and p.grad is not None and p.numel()
        ]
        others = [
            p.grad
            for g in self.groups
            for p in g.params
            if not g.clipped and p.grad is not None and p.numel()
        ]
        norm = _total_norm(clipped)
        if max_norm is not None and clipped:
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            foreach.mul_(clipped, factor)
        if others and not bool(torch.isfinite(rest := _total_norm(others))):
            return rest
        return norm


def _total_norm(grads: Sequence[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros([])
    norm: Tensor = torch.linalg.vector_norm(torch.stack(foreach.norm(list(grads))))
    return norm
