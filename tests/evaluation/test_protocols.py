import pytest
import torch
from torch.utils._pytree import tree_leaves

from fomal.engine.chunking import Chunks
from fomal.evaluation.protocols import classify, evaluate, regress
from fomal.inner import Adam
from fomal.utils import tree
from tests.helpers.oracle import adapt_one, batches


def adapted_networks(network, inner):
    make = lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.999))  # noqa: E731
    return [adapt_one(network, make, *batches(inner.episode, inner.plan, t))[0] for t in range(inner.episode.tasks)]


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
