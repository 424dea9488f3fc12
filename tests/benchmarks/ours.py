"""fomal's side of every pair."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor

from fomal import tree
from fomal.evaluation import classify
from tests.benchmarks.works import Work


def prepare(work: Work, kind: str, optimizer: str) -> Callable[[], dict[str, Tensor]]:
    """What is timed: see `tests.benchmarks.peers.Peer.prepare`."""
    if kind == "fit":
        return lambda: fit(work, optimizer)
    learner = work.learner(kind, optimizer)
    inner, phi = learner.inner_loop(work.episode(kind), training=kind != "evaluation"), learner.initialisation()
    if kind == "evaluation":

        def evaluate() -> dict[str, Tensor]:
            result = classify(inner, phi)
            return {"alone": result.logits, "together": result.logits_transductive}

        return evaluate
    return lambda: tree.detach(learner.rule(inner, phi)[0])


def fit(work: Work, optimizer: str) -> dict[str, Tensor]:
    """Train through the Trainer, from its making on; how far the weights have moved, with the sign of a gradient."""
    learner = work.learner("fit", optimizer)
    start = {name: p.detach().clone() for name, p in learner.network.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders and loggers
        trainer = L.Trainer(
            accelerator="gpu" if work.device == "cuda" else "cpu",
            devices=1,
            max_steps=work.fit_iterations,
            max_epochs=-1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(learner, datamodule=work.data)
    return {name: start[name] - p.detach().to(work.device) for name, p in learner.network.named_parameters()}


def quiet() -> None:
    """No lines of Lightning's for every training; fomal's own warnings stay."""
    logging.disable(logging.INFO)


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
