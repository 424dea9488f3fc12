"""fomal's side of every pair."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from fomal.engine.cuda_graph import CAPTURES
from fomal.evaluation.protocols import classify
from fomal.learner.meta_learner import MetaLearner
from fomal.outer.meta_gradient import meta_gradient
from fomal.tasks.datamodule import EpisodeDataModule
from tests.benchmarks.works import Work

WARM_UP = 4  # meta-iterations of a training that do not count: they trace, compile and capture


def prepare(work: Work, kind: str, optimizer: str) -> Callable[[], dict[str, Tensor]]:
    """What is timed: see `tests.benchmarks.peers.Peer.prepare`."""
    if kind == "fit":
        return lambda: fit(work, optimizer)
    learner = work.learner(kind, optimizer)
    run = part(learner, work, kind)
    cast = torch.autocast(work.device, torch.bfloat16) if work.bf16 else nullcontext()

    def confirmed() -> dict[str, Tensor]:
        with cast:
            found = run()
        confirm(learner, work.run_as)
        return found

    return confirmed


def part(learner: MetaLearner, work: Work, kind: str) -> Callable[[], dict[str, Tensor]]:
    """One meta-iteration up to the outer gradient, or the evaluation of a batch of tasks."""
    phi = learner.initialisation()
    if work.run_as == "captured":
        episode, state = work.episode(kind), learner.begun_state()
        learner.captured = captured = learner.capturing(learner.gradient_of, CAPTURES[work.device])
        return lambda: captured(episode, phi, state).gradient
    inner = learner.inner_loop(work.episode(kind), training=kind != "evaluation")
    if kind == "evaluation":

        def evaluate() -> dict[str, Tensor]:
            result = classify(inner, phi)
            return {"alone": result.logits, "together": result.logits_transductive}

        return evaluate
    return lambda: meta_gradient(learner.rule, inner, phi, skip=False).gradient


def confirm(learner: MetaLearner, run_as: str) -> None:
    """Raise RuntimeError where fomal has fallen back to another way than is timed."""
    tracer = learner.objective.tracer
    reason = (tracer.reason if tracer else "") or (learner.captured.reason if learner.captured else "")
    if reason:
        raise RuntimeError(f"fomal does not run {run_as}: {reason}")


def fit(work: Work, optimizer: str) -> dict[str, Tensor]:
    """Train through the Trainer, from its making on; how far the weights have moved, with the sign of a gradient."""
    learner = work.learner("fit", optimizer)
    start = weights(learner.network)
    train(learner, work.data, work, work.fit_iterations)
    confirm(learner, work.run_as)
    return moved(start, learner.network, work.device)


def train(module: L.LightningModule, data: EpisodeDataModule, work: Work, steps: int, *callbacks: Callback) -> None:
    """Through a new Trainer, without log and checkpoints."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders and loggers
        trainer = L.Trainer(
            accelerator="gpu" if work.device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if work.bf16 else "32-true",
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        trainer.fit(module, datamodule=data)


class Stamps(Callback):
    """Notes when the first meta-iterations, which do not count, and when all are done.

    Args:
        work: says how many count.

    Attributes:
        begin: how many do not count.
        end: how many there are.
    """

    def __init__(self, work: Work) -> None:
        self.device = work.device
        self.begin, self.end = WARM_UP, WARM_UP + work.fit_iterations
        self.times: dict[int, float] = {}

    def note(self, done: int) -> None:
        """So many are done."""
        if done in (self.begin, self.end):
            synchronise(self.device)
            self.times[done] = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """A meta-iteration is done."""
        self.note(trainer.global_step)

    def seconds(self) -> float:
        """Of a meta-iteration."""
        return (self.times[self.end] - self.times[self.begin]) / (self.end - self.begin)


def weights(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters."""
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def moved(start: dict[str, Tensor], network: nn.Module, device: str) -> dict[str, Tensor]:
    """How far the parameters are from `start`; the Trainer leaves them on the CPU."""
    return {name: start[name] - p.detach().to(device) for name, p in network.named_parameters()}


def quiet() -> None:
    """No lines of Lightning's for every training; fomal's own warnings stay."""
    logging.disable(logging.INFO)


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
