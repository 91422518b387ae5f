"""Backpropagation through a level of Glow without its activations: inputs are recomputed from outputs through the inverse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .coupling import Coupling
from .invertible_conv import mix_channels


class ReversibleLevel(torch.autograd.Function):
    """K steps of (affine map of channels, coupling); memory for activations does not grow with K.

    Only the level's output is kept. Backwards, the network of a coupling is run once, on the half that the coupling left as it was; that
    one evaluation serves both to undo the coupling and to differentiate it.

    References: Gomez et al. 2017, section 3, https://arxiv.org/abs/1707.04585 (the idea, for residual networks)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, biases: Tensor, inverses: Tensor, couplings: Sequence[Coupling], *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W); weights, inverses: (K, C, C); biases: (K, C). Returns: y, and the couplings' log_det (B,)."""
        log_det = x.new_zeros(len(x))
        for coupling, weight, bias in zip(couplings, weights, biases, strict=True):
            x, one = coupling(mix_channels(x, weight, bias))
            log_det = log_det + one
        ctx.save_for_backward(x, weights, biases, inverses)
        ctx.couplings = couplings
        device = x.device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return x, log_det

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> tuple[Any, ...]:
        """Gradients of x, the affine maps and the parameters of the couplings."""
        y, weights, biases, inverses = ctx.saved_tensors
        enabled, dtype = ctx.autocast
        grad_weights, grad_biases = torch.empty_like(weights), torch.empty_like(biases)
        grads: list[tuple[Tensor | None, ...]] = []
        for k in reversed(range(len(ctx.couplings))):
            coupling = ctx.couplings[k]
            parts = [coupling.kept, coupling.changed]
            a, z = y.split(parts, 1)
            grad_a, grad_z = grad_y.split(parts, 1)
            # the network once, with gradients; log s and t are leaves of a graph of their own
            with torch.enable_grad(), torch.autocast(y.device.type, dtype=dtype, enabled=enabled):
                a = a.detach().requires_grad_()
                raw = coupling.network(a)
                leaf = raw.detach().requires_grad_()
                log_s, t = coupling.scale_and_shift(leaf)
            with torch.no_grad():
                # z = (b + t) s: b = z / s - t, dL/dt = dL/db = dL/dz s, dL/d log s = dL/dz z + dL/d log_det
                if log_s is None:
                    b, grad_b, outputs, given = z - t, grad_z, (t,), (grad_z,)
                else:
                    s = log_s.exp()
                    b, grad_b = z / s - t, grad_z * s
                    outputs, given = (log_s, t), (torch.addcmul(grad_log_det.view(-1, 1, 1, 1), grad_z, z), grad_b)
            own = [coupling.range] if coupling.range is not None else []
            grad_raw, *grad_own = torch.autograd.grad(outputs, [leaf, *own], given)
            inner = list(coupling.network.parameters())
            grad_through, *grad_network = torch.autograd.grad(raw, [a, *inner], grad_raw)
            by_parameter = dict(zip([id(p) for p in [*own, *inner]], [*grad_own, *grad_network], strict=True))
            grads.append(tuple(by_parameter[id(p)] for p in coupling.parameters()))
            with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
                u = torch.cat([a.detach(), b], 1)                                                     # (B, C, H, W)
                grad_u = torch.cat([grad_a + grad_through, grad_b], 1)                                # (B, C, H, W)
                y = mix_channels(u - biases[k].view(-1, 1, 1), inverses[k])                           # (B, C, H, W)
                grad_biases[k] = grad_u.sum((0, 2, 3))
                grad_weights[k] = torch.einsum("bchw,bdhw->cd", grad_u, y)
                grad_y = mix_channels(grad_u, weights[k].t())                                         # (B, C, H, W)
        flat = [gradient for one in reversed(grads) for gradient in one]
        return grad_y, grad_weights, grad_biases, None, None, *flat


def run_reversibly(x: Tensor, weights: Tensor, biases: Tensor, inverses: Tensor, couplings: Sequence[Coupling]) -> tuple[Tensor, Tensor]:
    """A level's output and the log_det (B,) of its couplings, with the gradients that keeping the activations would give."""
    parameters = [parameter for coupling in couplings for parameter in coupling.parameters()]
    return ReversibleLevel.apply(x, weights, biases, inverses, couplings, *parameters)
