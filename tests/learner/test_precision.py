"""Inner and outer loop at every precision, against 64 bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fomal.cli import main
from fomal.data import SinusoidDataModule
from fomal.inner import SGD, Adam
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.restoring import take_dtypes
from fomal.models import MLP
from fomal.outer import FOMAML, MAML, BinomialMAML, QueryFOMAML, Reptile, TruncatedMAML
from tests.helpers.learners import Blobs, sine_learner, smooth_learner, trainer, weights
from tests.helpers.resume import same

pytestmark = pytest.mark.filterwarnings("ignore:trainer.precision=bf16-true rounds")  # but see the test of it

RULES = {
    "Reptile": (Reptile(), SGD(0.02)),
    "Reptile, Adam": (Reptile(), Adam(0.01)),
    "FOMAML": (FOMAML(tail_shots=1), SGD(0.02)),
    "query FOMAML": (QueryFOMAML(), SGD(0.02)),
    "MAML": (MAML(), SGD(0.02)),
    "truncated MAML": (TruncatedMAML(1), SGD(0.02)),
    "binomial MAML": (BinomialMAML(1), SGD(0.02)),
}
# How far the outer gradient may be off, as a share of its norm. bfloat16 keeps 8 bits; Adam without momentum takes
# steps of one length, and makes the most of a small gradient's errors.
TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 0.1, "bf16-true": 0.1}


def first_step(precision: str, name: str) -> tuple[torch.Tensor, torch.Tensor, MetaLearner]:
    """The first outer gradient, the losses of the first inner loops, and the learner."""
    seen: list[torch.Tensor] = []

    class Trace(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.append(torch.cat([p.grad.double().flatten() for p in self.param_groups[0]["params"]]))

    learner = smooth_learner(*RULES[name])
    learner.outer = replace(learner.outer, optimizer=lambda params: Trace(params, lr=1.0))
    trainer(1, precision=precision).fit(learner, datamodule=Blobs(train_query_shots=2))
    return seen[0], learner.train_losses.compute()[0], learner


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("rule", RULES)
def test_the_outer_gradient_is_that_of_64_bits_up_to_rounding(rule: str, precision: str) -> None:
    expected, losses, _ = first_step("64-true", rule)
    found, found_losses, learner = first_step(precision, rule)
    tolerance = TOLERANCE[precision] * (2.5 if rule == "Reptile, Adam" and "bf16" in precision else 1)
    assert 0 < (found - expected).norm() < tolerance * expected.norm()
    torch.testing.assert_close(found_losses, losses, rtol=0.02 if "bf16" in precision else 1e-5, atol=0)
    weight = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert all(p.dtype == weight for p in learner.network.parameters())
    moments = [v for kind, values in (learner.carried or {}).items() if kind != "shared" for v in values.values()]
    assert all(moment.dtype == torch.float32 for moment in moments)
    assert bool(moments) == (rule == "Reptile, Adam")


@pytest.mark.parametrize("precision", TOLERANCE)
def test_evaluation_is_that_of_64_bits_up_to_rounding(precision: str) -> None:
    figures = []
    for each in ("64-true", precision):
        learner = smooth_learner(Reptile(), SGD(0.05))
        trainer(1, precision=each).test(learner, datamodule=Blobs(shots=4, test_tasks=60), verbose=False)
        figures.append(learner.results["metrics"])
    expected, found = figures
    assert found["test/distance"] == pytest.approx(expected["test/distance"], rel=TOLERANCE[precision] / 2)
    assert found["test/accuracy"] == pytest.approx(expected["test/accuracy"], abs=0.03)
    assert expected["test/accuracy"] > 0.6


def test_bf16_true_rounds_small_outer_steps_away_and_says_so() -> None:
    learner = smooth_learner(Reptile(), SGD(0.02))
    learner.outer = replace(learner.outer, optimizer=lambda params: torch.optim.SGD(params, lr=1e-4))
    before = {name: p.detach().bfloat16() for name, p in learner.network.named_parameters()}
    with pytest.warns(UserWarning, match="bf16-true rounds small outer steps away; bf16-mixed does not"):
        trainer(2, precision="bf16-true").fit(learner, datamodule=Blobs())
    unmoved = sum(int((p == before[name]).sum()) for name, p in learner.network.named_parameters())
    assert unmoved > 0.5 * sum(p.numel() for p in before.values())


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "16"])
def test_16_bits_are_refused_on_a_cpu_too(precision: str, fails: Any) -> None:
    said = fails("fit", "--config", "sinusoid/reptile", f"--trainer.precision={precision}", code=1)
    assert said == (
        f"trainer.precision={precision} would need loss scaling inside the inner loop, which is not there: use "
        f"32-true, or bf16-mixed."
    )


def resumable() -> MetaLearner:
    """A learner with inner and outer Adam."""
    return sine_learner(outer={"optimizer": lambda params: torch.optim.Adam(params, lr=0.01), "final": 1.0})


def fitted(precision: str, steps: int, **settings: Any) -> tuple[MetaLearner, Any]:
    """A learner after `steps` meta-iterations, and its trainer."""
    run = trainer(steps, precision=precision)
    run.fit(learner := resumable(), datamodule=SinusoidDataModule(meta_batch_size=2), **settings)
    return learner, run


def evaluated(learner: MetaLearner, precision: str, **settings: Any) -> dict[str, float]:
    run = trainer(precision=precision)
    run.test(learner, datamodule=SinusoidDataModule(test_tasks=4), verbose=False, **settings)
    return dict(learner.results["metrics"])


def states(learner: MetaLearner) -> dict[str, torch.Tensor]:
    carried = {f"{part}/{name}": t for part, ts in (learner.carried or {}).items() for name, t in ts.items()}
    return {**weights(learner), **carried}


@pytest.mark.parametrize("precision", ["64-true", *TOLERANCE])
def test_checkpoints_keep_each_bit_and_are_taken_over_at_every_precision(precision: str, tmp_path: Path) -> None:
    path = tmp_path / "c.ckpt"
    whole, _ = fitted(precision, 4)
    half, run = fitted(precision, 2)
    run.save_checkpoint(path)
    resumed, _ = fitted(precision, 4, ckpt_path=path)
    same(states(resumed), states(whole))
    figures = evaluated(half, precision)
    assert evaluated(resumable(), precision, ckpt_path=path) == figures
    loaded = MetaLearner.load_from_checkpoint(
        path, network=MLP(hidden=(16,)), rule=Reptile(), inner_optimizer=Adam(0.01)
    )
    same(states(loaded), states(half))
    if "mixed" not in precision:
        assert evaluated(loaded, precision) == figures
    for other in {"64-true", *TOLERANCE} - {precision}:
        loss = evaluated(resumable(), other, ckpt_path=path)["test/loss"]
        assert loss == pytest.approx(figures["test/loss"], rel=0.05)
        fitted(other, 3, ckpt_path=path)


class Mixed(nn.Module):
    """A network of parameters in 16, 64 and complex 64 bits, the 16 bits first."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        self.weight = nn.Parameter(torch.full((1,), 1 / 3, dtype=torch.float64))
        self.turn = nn.Parameter(torch.full((1,), 1 + 2j, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight + self.turn.imag * self.turn.real + self.shift).to(x.dtype)


def test_each_tensor_gets_the_dtype_that_it_has_in_the_file() -> None:
    made, other = Mixed(), Mixed().float()
    other.turn.data = torch.ones(1, dtype=torch.complex128)
    take_dtypes(other, made.state_dict())
    other.load_state_dict(made.state_dict())
    same({k: v for k, v in other.state_dict().items() if k != "turn"}, {"shift": made.shift, "weight": made.weight})
    assert other.turn.item() == 1 + 2j


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_bf16_mixed_reaches_the_accuracy_of_32_bits_on_omniglot(omniglot_root: Path, tmp_path: Path) -> None:
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        folder = tmp_path / precision
        logger = (f"--trainer.logger.save_dir={folder}", "--trainer.logger.name=", "--trainer.logger.version=run")
        data = (f"--data.root={omniglot_root}", f"--data.cache_dir={tmp_path}")
        main(
            [
                *("fit", "--config", "omniglot/5way_1shot_reptile", *data, *logger),
                *("--trainer.max_steps=1000", f"--trainer.precision={precision}", "--trainer.accelerator=cpu"),
            ]
        )
        last = folder / "run" / "checkpoints" / "last.ckpt"
        main(["test", "--ckpt_path", str(last), "--data.test_tasks=1000", "--trainer.accelerator=cpu"])
        found[precision] = json.loads((folder / "run" / "results.json").read_text())["metrics"]
    print(found)
    for name in ("test/accuracy", "test/accuracy_transductive"):
        exact, half = found["32-true"][name], found["32-true"][f"{name}_ci95"]
        assert abs(found["bf16-mixed"][name] - exact) <= half
        assert exact > 0.6
