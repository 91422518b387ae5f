"""`fast_cpu_matmul` switches only when a trial allows it and always switches back."""

import pytest
import torch

from gen_pipelines.models import cpu_matmul
from gen_pipelines.models.cpu_matmul import MAX_ERROR, MatmulProbe, fast_cpu_matmul, probe_cpu_matmul

pytestmark = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"),
    reason="torch before 2.9 has no such switch: https://docs.pytorch.org/docs/stable/backends.html",
)


def precision() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def test_the_trial_leaves_the_switch_as_it_was_and_is_honest():
    before = precision()
    probe = probe_cpu_matmul()
    assert precision() == before
    assert probe.enabled == (probe.error <= MAX_ERROR and probe.speedup > 1.0)
    assert 0 < probe.default_error < MAX_ERROR


@pytest.mark.parametrize("enabled", [True, False])
def test_the_switch_is_set_in_the_block_alone(monkeypatch, caplog, enabled):
    monkeypatch.setattr(cpu_matmul, "probe_cpu_matmul", lambda: MatmulProbe(enabled, 2.0, 1e-7, 1e-7, "because"))
    before = precision()
    with pytest.raises(KeyError), fast_cpu_matmul() as probe:
        assert probe.enabled == enabled and (precision() == "bf16") == enabled
        raise KeyError
    assert precision() == before
    assert ("because" in caplog.text) == (not enabled)


def test_a_cpu_that_rounds_to_bf16_is_refused(monkeypatch):
    exact = torch.nn.functional.linear

    def rounding(x, weight):
        return exact(x.bfloat16(), weight.bfloat16()).float() if precision() == "bf16" else exact(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", rounding)
    probe = probe_cpu_matmul()
    assert not probe.enabled and probe.error > 1e-4 and "bf16" in probe.reason


def test_it_decorates_functions(monkeypatch):
    monkeypatch.setattr(cpu_matmul, "probe_cpu_matmul", lambda: MatmulProbe(True, 2.0, 1e-7, 1e-7, ""))

    @fast_cpu_matmul()
    def inside() -> str:
        return precision()

    assert inside() == "bf16" and precision() != "bf16"
