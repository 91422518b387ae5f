"""The conformance suite: schedulers that are broken on purpose fail where they should, diffusers' known faults are found.

That ours pass is in tests/schedulers/test_oracle.py.
"""

import subprocess
import sys

import diffusers
import pytest

from gen_pipelines.processes import EDMPath, Parameterization
from gen_pipelines.schedulers import ConsistencyScheduler, DDIMInverseScheduler, DDIMScheduler, EulerAncestralScheduler, HeunScheduler
from gen_pipelines.testing import (
    CHECKS,
    ConformanceError,
    Promise,
    Report,
    Row,
    check_scheduler,
    check_schedulers,
    diffusers_scheduler,
)  # fmt: skip
from gen_pipelines.testing.__main__ import main

FEW = ("sd_eps", "sd3_flow", "edm")


# ------------------------------------------------------------------------------------------------------------ broken on purpose


class TooLong(DDIMScheduler):
    """Every step lands a little too far out."""

    def step(self, *args, return_dict=True, **kwargs):
        out = super().step(*args, **kwargs)
        out.prev_sample = out.prev_sample * 1.004
        return out if return_dict else (out.prev_sample, out.pred_original_sample)


class NoAlpha(EulerAncestralScheduler):
    """The noise of a variance-exploding path on every path."""

    def _noise(self, like, generator):
        stage = self._stages[self._step_index]
        return super()._noise(like, generator) / max(stage.there.alpha, 0.3)


class ToWhole(DDIMScheduler):
    """Tells the network a whole number."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self._timesteps = self._timesteps.floor()
        self._values = self._timesteps.tolist()


class ShiftsTwice(DDIMScheduler):
    def grid_options(self):
        options = super().grid_options()
        return type(options)(**{**options.__dict__, "shift": options.shift**2 if options.shift else options.shift})


class StopsEarly(DDIMScheduler):
    """Ends at the least noise of the network."""

    def grid_options(self):
        return type(super().grid_options())(**{**super().grid_options().__dict__, "final_sigmas_type": "sigma_min"})


class FirstOrder(HeunScheduler):
    """Leaves out the correction."""

    def plan(self, grid):
        stages = super().plan(grid)
        for stage in stages:
            stage.first = True
        return stages

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        i = self._begin(timestep)
        stage = self._stages[i]
        x_0, eps = self._predict(model_output, sample, i)
        last = i == len(self._stages) - 1 or i % 2 == 1
        there = stage.here if last and stage.there.sigma else stage.there
        return self._end(there.alpha * x_0 + there.sigma * eps, x_0, sample, i, return_dict)


class Forgets(DDIMScheduler):
    def save_pretrained(self, folder, **kwargs):
        type(self)().bind(self.parameterization.with_(clip_sample=True, clip_sample_range=0.2)).__class__.__mro__[1].save_pretrained(
            self.bind(self.parameterization.with_(clip_sample=True, clip_sample_range=0.2)), folder, **kwargs
        )


class Obliging(DDIMScheduler):
    """Steps whatever it is told."""

    def _begin(self, timestep):
        try:
            return super()._begin(timestep)
        except ValueError:
            return 0


@pytest.mark.parametrize(
    ("cls", "check", "networks"),
    [
        (TooLong, "moments", FEW),
        (TooLong, "mixture", ("plain_flow",)),
        (TooLong, "marginals", FEW),
        (TooLong, "points", FEW),
        (TooLong, "round trip", FEW),
        (TooLong, "grids", ("plain_flow",)),
        (NoAlpha, "marginals", ("sd_eps", "sd3_flow")),
        (NoAlpha, "points", ("sd_eps", "sd3_flow")),
        (ToWhole, "grid", ("sd3_flow",)),
        (ShiftsTwice, "grid", ("sd3_flow", "plain_flow")),
        (StopsEarly, "grid", ("sd_eps", "edm")),
        (Forgets, "save and load", FEW),
        (Obliging, "refusals", FEW),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else v if isinstance(v, str) else "",
)
def test_a_broken_scheduler_fails(cls, check, networks):
    promise = Promise(exact_for_points=True)
    report = check_scheduler(cls, checks=[check], networks=networks, promise=promise)
    assert {row.network for row in report.failures} == set(networks), str(report)
    assert not report.passed
    with pytest.raises(ConformanceError, match=f"{cls.__name__}, {check} on {networks[0]}"):
        report.raise_for_failures()


def test_an_order_that_is_not_kept_fails():
    report = check_scheduler(FirstOrder, checks=["order"], promise=Promise(order=2))
    assert [row.passed for row in report.rows] == [False, False]
    assert report.rows[0].measured["order"] == pytest.approx(1.0, abs=0.3)
    # of one that promises nothing, it must only converge
    assert check_scheduler(DDIMScheduler, checks=["order"], promise=Promise()).passed
    assert not check_scheduler(TooLong, checks=["order"], promise=Promise()).passed


def test_a_promise_may_be_the_classs_own():
    class Modest(DDIMScheduler):
        promise = Promise(order=2)

    assert not check_scheduler(Modest, checks=["order"]).passed


# --------------------------------------------------------------------------------------------------------------------- diffusers


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("DDIMScheduler", ("sd_eps", "ddpm_eps", "zero_snr_v"), ("sd3_flow", "edm")),
        ("EulerDiscreteScheduler", ("sd_eps", "ddpm_eps"), ("sd3_flow", "plain_flow", "edm")),
        ("EDMEulerScheduler", ("edm",), ("sd_eps", "zero_snr_v")),
        ("FlowMatchEulerDiscreteScheduler", ("sd3_flow", "plain_flow"), ("sd_eps", "edm")),
        ("UniPCMultistepScheduler", ("zero_snr_v",), ("sd3_flow",)),
    ],
)
def test_a_swap_inside_diffusers_is_judged(name, right, wrong):
    report = check_scheduler(getattr(diffusers, name), checks=["moments"], networks=(*right, *wrong), samples=2000)
    assert {row.network for row in report.rows if row.passed} == set(right), str(report)
    assert {row.network for row in report.failures} == set(wrong)
    hosted = check_scheduler(getattr(diffusers, name), checks=["moments"], networks=(*right, *wrong), samples=2000, hosted=True)
    hosted.raise_for_failures()


def test_known_faults_of_diffusers_grids_are_found():
    """Issue 13243: a shift that is applied twice at the low end; time cast to a whole number; issue 12633: DDIM's stride on linspace."""
    report = check_scheduler(diffusers.FlowMatchEulerDiscreteScheduler, checks=["grid"], networks=["sd3_flow"])
    assert report.rows[0].passed is False
    assert report.rows[0].measured["shift off by"] > 0.01
    report = check_scheduler(diffusers.DDIMScheduler, checks=["grids"], networks=["ddpm_eps"], promise=Promise(steps=400))
    assert {row.grid for row in report.failures} >= {"linspace", "trailing"}


def test_what_a_repository_of_diffusers_has():
    assert type(diffusers_scheduler("sd3_flow")) is diffusers.FlowMatchEulerDiscreteScheduler
    with pytest.raises(ValueError, match="none|no scheduler for 'vp_cosine_v'"):
        diffusers_scheduler("vp_cosine_v")


# ----------------------------------------------------------------------------------------------------------------- other kinds, bad calls


def test_consistency_rules_and_inversion_are_judged_as_such():
    report = check_scheduler(ConsistencyScheduler)
    report.raise_for_failures()
    assert {row.network for row in report.rows} == {"consistency", "distilled_flow", "distilled_v"}
    report = check_scheduler(DDIMInverseScheduler, networks=["sd_eps", "plain_flow"])
    report.raise_for_failures()
    assert {row.check for row in report.rows} == {"round trip", "grid", "save and load", "refusals"}


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "CMStochasticIterativeScheduler", "FlowMatchLCMScheduler"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hosted_consistency_rules(name):
    """TCD with eta below 1 goes part of each way along the network's own eps, so that only LCM-like rules are judged by moments."""
    p = Parameterization(EDMPath(), "consistency", sigma_data=0.5)
    from gen_pipelines.schedulers import BridgedScheduler

    make = lambda **options: BridgedScheduler(getattr(diffusers, name)(**options), p)
    checks = ["moments", "save and load"] if name != "TCDScheduler" else ["save and load"]
    check_scheduler(make, checks=checks, networks=["consistency"], promise=Promise(kind="consistency"), name=name).raise_for_failures()


def test_bad_calls_of_hosted_schedulers_are_refused():
    check_scheduler(diffusers.DDIMScheduler, checks=["refusals"], networks=FEW, hosted=True).raise_for_failures()


def test_a_function_that_makes_one():
    report = check_scheduler(lambda **options: DDIMScheduler(**options), checks=["order", "moments"], networks=["edm"], name="mine")
    assert report.passed
    assert {row.scheduler for row in report.rows} == {"mine"}


def test_refusals_are_no_failures():
    class Picky(DDIMScheduler):
        def bind(self, parameterization, grid=None):
            if parameterization.path.name == "edm":
                raise ValueError("Picky: not on EDM; take another.")
            return super().bind(parameterization, grid)

    report = check_scheduler(Picky, checks=["moments"], networks=["edm", "plain_flow"])
    assert [row.passed for row in report.rows] == [None, True]
    assert "refused" in str(report)
    assert "Picky: not on EDM" in report.rows[0].note
    nothing = check_scheduler(Picky, checks=["moments"], networks=["edm"])
    assert not nothing.passed
    with pytest.raises(ConformanceError, match="nothing was judged"):
        nothing.raise_for_failures()


def test_bad_calls():
    for options, message in (({"checks": ["speed"]}, "unknown check 'speed'"), ({"networks": ["vgg"]}, "unknown network 'vgg'")):
        with pytest.raises(ValueError, match=message):
            check_scheduler(DDIMScheduler, **options)
    with pytest.raises(TypeError, match="got a DDIMScheduler object"):
        check_scheduler(DDIMScheduler())
    with pytest.raises(TypeError, match="neither a scheduler"):
        check_scheduler(dict)


# ------------------------------------------------------------------------------------------------------------------------- the report

ROWS = Report(
    (
        Row("A", "moments", "edm", measured={"mean": 0.01, "spread": 0.0}),
        Row("A", "moments", "sd_eps", passed=False, measured={"mean": 0.5, "spread": 2e6}, allowed={"mean": 0.02}),
        Row("B", "moments", "edm", passed=None, note="ValueError: no"),
        Row("B", "order", "edm", measured={"order": 1.98}),
        Row("B", "grid", "sd_eps", passed=False, note="AttributeError: x"),
        Row("B", "points", "sd_eps", passed=None, note="not promised"),
    )
)


def test_the_matrix():
    assert ROWS.matrix() == (["scheduler", "edm", "sd_eps"], [["A", "ok", "0.50 / 2e6"], ["B", "refused", "AttributeError"]])
    assert ROWS.only(scheduler="B").matrix() == (
        ["network", "moments", "order", "grid", "points"],
        [["edm", "refused", "1.98", "", ""], ["sd_eps", "", "", "AttributeError", "-"]],
    )
    assert ROWS.table().splitlines()[1] == "A          ok       0.50 / 2e6"
    assert ROWS.markdown().splitlines()[1] == "| --- | --- | --- |"
    assert "A, B: 2 of 4 checks passed" in str(ROWS)
    assert "A, moments on sd_eps: mean 0.5 (allowed 0.02), spread 2e+06" in str(ROWS)
    assert str(Report(())) == "no checks were run"
    assert not Report(()).passed
    assert [row.check for row in ROWS.only(scheduler="B", network=("edm",)).rows] == ["moments", "order"]


def test_several_in_one_report():
    report = check_schedulers([DDIMScheduler, HeunScheduler], checks=["grid"], networks=["edm"])
    assert report.passed
    assert [row.scheduler for row in report.rows] == ["DDIMScheduler", "HeunScheduler"]
    assert set(CHECKS) > {row.check for row in report.rows}


def test_the_module_runs_a_class_of_ones_own(capsys):
    assert main(["gen_pipelines:ConsistencyScheduler"]) == 0
    assert "ConsistencyScheduler: " in capsys.readouterr().out
    for bad in ("gen_pipelines", "gen_pipelines:Nothing", "no_such_module:X"):
        with pytest.raises(SystemExit):
            main([bad])


@pytest.mark.slow  # starts a process; a minute
def test_the_module_prints_the_matrix_of_the_docs():
    """docs/concepts/conformance.md shows this run: the same verdicts, whatever the last digit of a wrong number is."""
    from pathlib import Path

    done = subprocess.run([sys.executable, "-m", "gen_pipelines.testing", "--markdown"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cells = lambda text: [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    page = Path(__file__).parents[2] / "docs/concepts/conformance.md"
    shown = {line[0].strip("`"): line[1:] for line in cells(page.read_text(encoding="utf-8")) if len(line) == 8}
    found = {line[0]: line[1:] for line in cells(done.stdout)}
    assert found.keys() == shown.keys()
    for name, line in found.items():
        assert [cell == "ok" for cell in line] == [cell == "ok" for cell in shown[name]], name
        if not name.startswith("diffusers") and name not in ("scheduler", "---"):
            assert line == ["ok"] * 7, name


def test_a_sample_of_odd_size_is_no_problem():
    assert check_scheduler(DDIMScheduler, checks=["moments"], networks=["edm"], samples=3).passed
