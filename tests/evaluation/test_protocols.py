import dataclasses

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fomal.engine.chunking import Chunks
from fomal.evaluation import Accuracy, MacroF1, NegativeLogLikelihood, QueryLoss
from fomal.evaluation.protocols import classify, evaluate, regress
from fomal.inner import SGD, Adam, CrossEntropy
from fomal.inner.objective import Objective
from fomal.tasks.episode import NO_TARGET
from fomal.utils import tree
from tests.helpers.oracle import adapt_one, batches


def adapted_networks(network, inner):
    make = lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.999))  # noqa: E731
    return [adapt_one(network, make, *batches(inner.episode, inner.indices, t))[0] for t in range(inner.episode.tasks)]


def test_both_protocols_equal_the_released_procedure(network, episode, make_inner):
    inner = make_inner(Adam(0.01))
    result = classify(inner, tree.detach(dict(network.named_parameters())))
    networks = adapted_networks(network, inner)
    with torch.no_grad():
        for t, adapted in enumerate(networks):
            alone = [adapted(torch.cat([episode.support_x[t], x[None]]))[-1] for x in episode.query_x[t]]
            torch.testing.assert_close(result.logits[t], torch.stack(alone), rtol=1e-7, atol=1e-9)
            together = adapted(episode.query_x[t])
            torch.testing.assert_close(result.logits_transductive[t], together, rtol=1e-7, atol=1e-9)
            right = (together.argmax(1) == episode.query_y[t]).double().mean()
            assert result.accuracy_transductive[t] == right
            way = [(p - start).flatten() for p, start in zip(adapted.parameters(), network.parameters(), strict=True)]
            torch.testing.assert_close(result.distance[t], torch.cat(way).norm(), rtol=1e-9, atol=0)


def test_no_step_judges_the_initialisation(network, episode, make_inner):
    result = classify(make_inner(Adam(0.01), steps=0), tree.detach(dict(network.named_parameters())))
    with torch.no_grad():
        for t in range(episode.tasks):
            alone = [network(torch.cat([episode.support_x[t], x[None]]))[-1] for x in episode.query_x[t]]
            torch.testing.assert_close(result.logits[t], torch.stack(alone), rtol=1e-9, atol=1e-11)
            together = network(episode.query_x[t])
            torch.testing.assert_close(result.logits_transductive[t], together, rtol=1e-9, atol=1e-11)
    assert not result.distance.any()


def test_only_transductive_prediction_sees_the_other_queries(network, episode, make_inner):
    phi = tree.detach(dict(network.named_parameters()))
    changed = episode.query_x.clone()
    changed[:, 1:] = 1 - changed[:, 1:]
    before = classify(make_inner(Adam(0.01)), phi)
    after = classify(make_inner(Adam(0.01), episode=episode._replace(query_x=changed)), phi)
    torch.testing.assert_close(after.logits[:, 0], before.logits[:, 0], rtol=1e-10, atol=1e-12)
    assert (after.logits_transductive[:, 0] - before.logits_transductive[:, 0]).abs().min() > 1e-6


def test_regression_measures_the_query_loss_after_each_step(make_inner, episode):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(81, 1)).double()
    targets = episode._replace(support_y=torch.randn(4, 12, 1).double(), query_y=torch.randn(4, 6, 1).double())
    phi = tree.detach(dict(network.named_parameters()))
    inner = make_inner(Adam(0.01), episode=targets)
    inner.objective.network = network
    inner = make_inner(Adam(0.01), episode=targets, state=Adam(0.01).init(phi), objective=inner.objective)
    result = regress(inner, phi)
    assert result.losses.shape == (4, 5)
    for t, adapted in enumerate(adapted_networks(network, inner)):
        before = torch.nn.functional.mse_loss(network(targets.query_x[t]), targets.query_y[t])
        after = torch.nn.functional.mse_loss(adapted(targets.query_x[t]), targets.query_y[t])
        torch.testing.assert_close(result.losses[t, [0, -1]], torch.stack([before, after]), rtol=1e-8, atol=1e-10)
        way = [(p - start).flatten() for p, start in zip(adapted.parameters(), network.parameters(), strict=True)]
        torch.testing.assert_close(result.distance[t], torch.cat(way).norm().detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(result.predictions[t], adapted(targets.query_x[t]), rtol=1e-8, atol=1e-10)


def test_evaluation_holds_no_graph(network, make_inner):
    result = classify(make_inner(Adam(0.01)), dict(network.named_parameters()))
    assert not result.logits.requires_grad


def tensors(result):
    return [part for part in tree_leaves(result) if isinstance(part, torch.Tensor)]


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_chunks_give_the_same_results_of_each_task(network, make_inner, episode, kind):
    phi = tree.detach(dict(network.named_parameters()))
    targets = episode._replace(support_y=torch.rand(4, 12, 3).double(), query_y=torch.rand(4, 6, 3).double())
    inner = make_inner(Adam(0.01), episode=targets if kind == "regression" else episode)
    expected = evaluate(inner, phi, Chunks(4))
    plain = regress(inner, phi) if kind == "regression" else classify(inner, phi)
    assert all(torch.equal(a, b) for a, b in zip(tensors(expected), tensors(plain), strict=True))
    for size in (1, 2, 3):
        found = evaluate(inner, phi, Chunks(size))
        assert type(found) is type(expected)
        assert found.steps == expected.steps
        for a, b in zip(tensors(found), tensors(expected), strict=True):
            assert a.shape == b.shape
            assert (a - b).norm() <= 1e-12 * b.norm()


EAGER = pytest.mark.parametrize("make_inner", ["eager"], indirect=True)


@pytest.mark.parametrize("steps", [[0, 2], [4]])
@EAGER
def test_figures_by_step_are_those_of_shorter_inner_loops(network, make_inner, steps):
    phi = tree.detach(dict(network.named_parameters()))
    metrics = [Accuracy(), NegativeLogLikelihood(), MacroF1(), QueryLoss()]
    inner = make_inner(SGD(0.05))
    found = evaluate(inner, phi, Chunks(3), metrics, steps)
    assert found.steps == tuple(sorted({*steps, 4}))
    assert list(found.figures) == ["accuracy", "nll", "macro_f1", "loss"]
    for place, step in enumerate(found.steps):
        alone = classify(dataclasses.replace(inner, indices=inner.indices[:step]), phi, metrics)
        assert alone.steps == ()
        for name, values in found.figures.items():
            assert values.shape == (4, 2, len(found.steps))
            torch.testing.assert_close(values[..., place], alone.figures[name][..., 0], rtol=1e-9, atol=1e-12)


def test_the_loss_of_both_protocols_is_that_of_their_logits(network, make_inner, episode):
    phi = tree.detach(dict(network.named_parameters()))
    result = classify(make_inner(Adam(0.01)), phi, [QueryLoss(), NegativeLogLikelihood()])
    for place, logits in enumerate((result.logits, result.logits_transductive)):
        expected = torch.nn.functional.cross_entropy(logits.movedim(-1, 1), episode.query_y, reduction="none").mean(1)
        torch.testing.assert_close(result.figures["loss"][:, place, 0], expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(result.figures["nll"][:, place, 0], expected, rtol=1e-8, atol=1e-10)
    assert (result.figures["loss"][:, 0] - result.figures["loss"][:, 1]).abs().min() > 1e-6  # batch norm couples them


@EAGER
def test_the_loss_alone_is_the_same_in_a_loop_over_tasks_and_with_weights(network, make_inner, episode):
    phi = tree.detach(dict(network.named_parameters()))
    y = episode.query_y.clone()
    y[0, :3] = NO_TARGET
    inner = make_inner(Adam(0.01), episode=episode._replace(query_y=y))
    loss = CrossEntropy(class_weights=[1.0, 2.0, 5.0])
    results = []
    for vectorize in (True, False):
        objective = Objective(network, vectorize, None, loss)
        own = dataclasses.replace(inner, objective=objective)
        results.append(classify(own, phi, [QueryLoss()]))
    first = results[0]
    torch.testing.assert_close(first.figures["loss"], results[1].figures["loss"], rtol=1e-8, atol=1e-10)
    weight = torch.tensor(loss.class_weights, dtype=torch.float64)
    for place, logits in enumerate((first.logits, first.logits_transductive)):
        for t in range(4):
            expected = torch.nn.functional.cross_entropy(logits[t], y[t], weight, ignore_index=NO_TARGET)
            torch.testing.assert_close(first.figures["loss"][t, place, 0], expected, rtol=1e-8, atol=1e-10)


@EAGER
def test_a_loss_that_names_no_metric_of_ours_is_refused(network, make_inner):
    class Odd(CrossEntropy):
        def metrics(self, y):
            return ("accuracy", "error")

    inner = make_inner(Adam(0.01), objective=Objective(network, True, None, Odd()))
    with pytest.raises(ValueError, match="^Odd.metrics gives 'error': use accuracy, loss, nll, .*, or model.metrics"):
        evaluate(inner, tree.detach(dict(network.named_parameters())), Chunks(4))
