"""Judge an initialisation: adapt to each task's support set, predict its query set, as Nichol et al. 2018 do."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fomal.engine.chunking import Chunks
from fomal.inner.loop import InnerLoop
from fomal.tasks.episode import NO_TARGET
from fomal.utils.tree import Tree, distance, stack


class ClassificationResult(NamedTuple):
    """Per-task results.

    Attributes:
        logits: (T, Q, ways), each query forwarded with the support set and nothing else; (T, Q, *places, ways) where
            an example has many labels.
        logits_transductive: likewise, all queries of a task forwarded together.
        accuracy: (T,), share of the queries' labels predicted right from `logits`; `NO_TARGET` is none.
        accuracy_transductive: (T,), likewise from `logits_transductive`.
        distance: (T,), of the adapted parameters from the initialisation: D(phi, W_t) in section 5.2 of Nichol et
            al. 2018, Euclidean.
    """

    logits: Tensor
    logits_transductive: Tensor
    accuracy: Tensor
    accuracy_transductive: Tensor
    distance: Tensor


class RegressionResult(NamedTuple):
    """Per-task results.

    Attributes:
        predictions: (T, Q, *prediction) after the last step.
        losses: (T, k + 1), query loss before the first step and after each.
        distance: (T,), of the adapted parameters from the initialisation, Euclidean.
    """

    predictions: Tensor
    losses: Tensor
    distance: Tensor


def evaluate(inner: InnerLoop, start: Tree, chunks: Chunks) -> ClassificationResult | RegressionResult:
    """Adapt from `start` and predict the queries, in chunks of as many tasks as memory allows."""
    judge: Callable[[InnerLoop, Tree], ClassificationResult | RegressionResult]
    y = inner.episode.query_y
    judge = classify if "accuracy" in inner.objective.for_queries().loss_of(y).metrics(y) else regress
    # Nothing is kept of a step, so three of them show what all take.
    results = [result for result, _ in chunks.each("evaluation", inner, lambda part: judge(part, start), steps=3)]
    return results[0] if len(results) == 1 else type(results[0])(*map(torch.cat, zip(*results, strict=True)))


@torch.no_grad()
def classify(inner: InnerLoop, start: Tree) -> ClassificationResult:
    """Adapt from `start` and classify the queries under both protocols, in one pass over the tasks."""
    episode, objective = inner.episode, inner.objective.for_queries()
    adapted = inner.rollout(start).end
    alone = objective.predict_inductive(adapted, episode.support_x, episode.query_x)  # (T, Q, ways)
    together = objective.predict(adapted, episode.query_x)  # (T, Q, ways)
    right, right_together = (_accuracy(logits, episode.query_y) for logits in (alone, together))
    return ClassificationResult(alone, together, right, right_together, distance(adapted, start))


@torch.no_grad()
def regress(inner: InnerLoop, start: Tree) -> RegressionResult:
    """Adapt from `start` and measure the query loss before the first step and after each."""
    params = stack(start, inner.episode.tasks)
    losses = [inner.query_losses(params)]  # each (T,)
    for step in inner.steps(start):
        params = step.after
        losses.append(inner.query_losses(params))
    predictions = inner.objective.for_queries().predict(params, inner.episode.query_x)
    return RegressionResult(predictions, torch.stack(losses, 1), distance(params, start))


def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The share (T,) of the labels y (T, Q, *places) at which logits (T, Q, *places, ways) are largest."""
    given = (y != NO_TARGET).flatten(1)
    return (logits.argmax(-1) == y).flatten(1).double().sum(1) / given.sum(1)
