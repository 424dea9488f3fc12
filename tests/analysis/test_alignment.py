from __future__ import annotations

import pytest
import torch

from fomal.analysis.alignment import gradient_alignment, halves
from fomal.inner.objective import Objective
from fomal.utils import tree
from tests.helpers.episodes import classification_episode
from tests.helpers.oracle import gradient_of


class Scaled(torch.nn.Module):
    """With a parameter that is a scalar."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.scale = network, torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.network(x)


def test_alignment_equals_a_double_loop_over_tasks(network):
    network = Scaled(network)
    episode = classification_episode(tasks=5, shots=2, query=1)
    phi = tree.detach(dict(network.named_parameters()))
    both = []
    for x, y in halves(episode):
        gradients = [torch.cat([g.flatten() for g in gradient_of(network, x[t], y[t])]) for t in range(5)]
        both.append(gradients)
    for name, normed in (("", False), ("_cosine", True)):
        g1, g2 = ([g / g.norm() if normed else g for g in half] for half in both)
        within = torch.stack([g1[t] @ g2[t] for t in range(5)])
        pairs = {(s, t): g1[s] @ g2[t] for s in range(5) for t in range(5) if s != t}
        found = gradient_alignment(
            Objective(network, True), phi, [episode.select(torch.arange(3)), episode.select(torch.arange(3, 5))]
        )
        assert getattr(found, f"within{name}").value == pytest.approx(within.mean().item(), rel=1e-9)
        assert getattr(found, f"within{name}").ci95 == pytest.approx(1.96 * within.std().item() / 5**0.5, rel=1e-9)
        assert getattr(found, f"between{name}").value == pytest.approx(float(sum(pairs.values())) / 20, rel=1e-9)
        left = [sum(v for (s, t), v in pairs.items() if out not in (s, t)) / 12 for out in range(5)]
        mean = sum(left) / 5
        error = (4 / 5 * sum((value - mean) ** 2 for value in left)) ** 0.5
        assert getattr(found, f"between{name}").ci95 == pytest.approx(1.96 * float(error), rel=1e-9)


@pytest.mark.parametrize(("shots", "query"), [(4, 2), (3, 1), (1, 1), (2, 0), (1, 2)])
def test_the_halves_are_disjoint_and_have_every_class(shots, query):
    episode = classification_episode(tasks=2, ways=3, shots=shots, query=query)
    (x1, y1), (x2, y2) = halves(episode)
    assert x1.shape[1] + x2.shape[1] == 3 * (shots + query)
    assert {image.sum().item() for image in x1[0]}.isdisjoint(image.sum().item() for image in x2[0])
    for y in (y1, y2):
        counts = torch.bincount(y[0], minlength=3)
        assert counts.min() >= 1
        assert counts.max() - counts.min() == 0
    for x, y in ((x1, y1), (x2, y2)):  # labels went with their images
        examples = {
            i.sum().item(): label.item() for i, label in zip(episode.support_x[0], episode.support_y[0], strict=True)
        }
        examples |= {
            i.sum().item(): label.item() for i, label in zip(episode.query_x[0], episode.query_y[0], strict=True)
        }
        assert [examples[image.sum().item()] for image in x[0]] == y[0].tolist()


def test_a_single_example_of_a_class_is_refused():
    with pytest.raises(ValueError, match="raise data.shots or data.query_shots"):
        halves(classification_episode(shots=1, query=0))
