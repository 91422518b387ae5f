"""An opt-in, faster matrix product for inference on CPUs where oneDNN outruns the default library."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

MAX_ERROR = 1e-6


@dataclass(frozen=True)
class MatmulProbe:
    """What a trial product showed: `error` and `default_error` relative to float64, `speedup` over the default, `enabled` and why."""

    enabled: bool
    speedup: float
    error: float
    default_error: float
    reason: str


def _seconds(x: torch.Tensor, weight: torch.Tensor, repeats: int) -> float:
    start = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
    for _ in range(repeats):
        torch.nn.functional.linear(x, weight)
    stop = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
    return stop - start


@contextlib.contextmanager
def _oneDNN_products(enabled: bool = True):
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        if enabled:
            matmul.fp32_precision = "bf16"
        yield
    finally:
        matmul.fp32_precision = before


def probe_cpu_matmul() -> MatmulProbe:
    """Compares the two products on a 512 x 384 times 384 x 384 one: speed (interleaved, best of 9) and error relative to float64."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.backends.mkldnn, "matmul"):
        return MatmulProbe(False, 1.0, 0.0, 0.0, "this torch has no oneDNN or no switch for it")
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(512, 384, generator=generator), torch.randn(384, 384, generator=generator)
    exact = x.double() @ weight.double().T
    with torch.no_grad():
        errors, best = [], [float("inf"), float("inf")]
        for switch in (False, True):
            with _oneDNN_products(switch):
                errors.append(float((torch.nn.functional.linear(x, weight).double() - exact).abs().max() / exact.abs().max()))
        for _ in range(9):
            for switch in (False, True):
                with _oneDNN_products(switch):
                    best[switch] = min(best[switch], _seconds(x, weight, repeats=4))
    speedup = best[0] / max(best[1], 1e-12)
    if not errors[1] <= MAX_ERROR:
        return MatmulProbe(
            False, speedup, errors[1], errors[0], f"its error {errors[1]:.1e} is above {MAX_ERROR:.0e}: this CPU really rounds to bf16"
        )
    if speedup <= 1.0:
        return MatmulProbe(False, speedup, errors[1], errors[0], f"it is not faster here ({speedup:.2f} times the default)")
    return MatmulProbe(True, speedup, errors[1], errors[0], f"{speedup:.2f} times the default, error {errors[1]:.1e}")


class fast_cpu_matmul(contextlib.ContextDecorator):
    """Lets oneDNN do the float32 matrix products of a block, if a trial shows that it is faster and as exact. Never used unasked.

    On some CPUs torch's default library runs at half of oneDNN's speed. The switch that sends products to oneDNN,
    `torch.backends.mkldnn.matmul.fp32_precision = "bf16"`, also permits it to round to bf16 where the CPU has units for that, so the result
    is first compared with float64 on a small product: above a relative error of 1e-6, or when nothing is gained, the block runs unchanged
    and a warning says why. For inference: training measured slower with it. The switch is global to the process and restored at the end.

    ```python
    with fast_cpu_matmul() as probe:
        images = pipe("a red apple").images
    print(probe.enabled, probe.speedup)
    ```
    """

    def __init__(self) -> None:
        self._contexts: list[contextlib.AbstractContextManager[None]] = []  # a decorated function may call itself

    def __enter__(self) -> MatmulProbe:
        probe = probe_cpu_matmul()
        if not probe.enabled:
            logger.warning("fast_cpu_matmul: the default matrix product stays: %s.", probe.reason)
        context = _oneDNN_products(probe.enabled)
        context.__enter__()
        self._contexts.append(context)
        return probe

    def __exit__(self, *exception: object) -> None:
        self._contexts.pop().__exit__(*exception)
