import logging

import pytest
import torch
import torch.nn.functional as F

from fomal.inner.objective import Objective
from fomal.models import ResNet12
from fomal.utils import tree
from tests.helpers.oracle import gradient_of, loss_of

SMALL = (2, 3, 4, 5)


def small(ways=3):
    torch.manual_seed(0)
    return ResNet12(ways, widths=SMALL).double()


def tasks(count=2, examples=6, size=18):
    """Images (T, B, 3, size, size) and labels (T, B)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, examples, 3, size, size, generator=generator, dtype=torch.float64)
    return x, torch.arange(examples).remainder(3).expand(count, -1)


def test_it_has_the_published_number_of_parameters():
    network = ResNet12(ways=5)
    inputs, widths = (3, 64, 160, 320), (64, 160, 320, 640)
    convolutions = sum(9 * (i * o + 2 * o * o) + i * o for i, o in zip(inputs, widths, strict=True))
    norms = sum(4 * 2 * o for o in widths)
    assert convolutions + norms == 12_424_320
    assert sum(p.numel() for p in network.parameters()) == 12_424_320 + 5 * 641


@pytest.mark.parametrize(
    ("size", "sizes"), [(84, [42, 21, 10, 5]), (32, [16, 8, 4, 2]), (28, [14, 7, 3, 1]), (16, [8, 4, 2, 1])]
)
def test_each_block_halves_the_image_rounding_down(size, sizes):
    network, found = ResNet12(7, in_channels=1, widths=SMALL), []
    x = torch.rand(2, 1, size, size)
    assert network(x).shape == (2, 7)
    for block, width in zip(network.blocks, SMALL, strict=True):
        x = block(x)
        assert x.shape[:2] == (2, width)
        found.append(x.shape[-1])
    assert found == sizes


def test_it_is_the_network_written_out():
    """In the order of MetaOptNet's: conv, norm, activation twice; conv, norm; shortcut; sum, activation, pooling."""
    network, x = small(), tasks()[0][0]

    def norm(y, weight, bias):
        mean, variance = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), correction=0, keepdim=True)
        return (y - mean) / (variance + 1e-5).sqrt() * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)

    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # the norms' too
    p, y = dict(network.named_parameters()), x
    for block in range(4):
        b = f"blocks.{block}"
        z = y
        for layer in range(3):
            z = F.conv2d(z, p[f"{b}.convs.{layer}.weight"], padding=1)
            z = norm(z, p[f"{b}.norms.{layer}.weight"], p[f"{b}.norms.{layer}.bias"])
            if layer < 2:
                z = torch.maximum(z, 0.1 * z)
        z = z + norm(
            torch.einsum("bihw,oi->bohw", y, p[f"{b}.shortcut.0.weight"][:, :, 0, 0]),
            p[f"{b}.shortcut.1.weight"],
            p[f"{b}.shortcut.1.bias"],
        )
        y = F.max_pool2d(torch.maximum(z, 0.1 * z), 2)
    expected = y.mean((2, 3)) @ p["head.weight"].T + p["head.bias"]
    torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(network.eval()(x), expected, rtol=1e-9, atol=1e-9)


def test_convolutions_are_initialised_as_metaoptnets():
    torch.manual_seed(0)
    block = ResNet12().blocks[1]
    for weight, fan_out in ((block.convs[0].weight, 9 * 160), (block.shortcut[0].weight, 160)):
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
        assert abs(weight.mean().item()) < 4 * weight.std().item() / weight.numel() ** 0.5


def test_it_is_vectorised_over_tasks_with_right_first_and_second_derivatives(caplog):
    """Against torch.autograd on one task after the other."""
    network, (x, y) = small(), tasks()
    params = tree.detach(dict(network.named_parameters()))
    objective = Objective(network)
    with caplog.at_level(logging.WARNING):
        objective.settle(params, x, y, second_order=True)
    assert objective.vectorize is True
    assert not caplog.records
    vectors = {name: torch.randn_like(value) for name, value in tree.stack(params, 2).items()}
    for vectorize in (True, False):
        objective.vectorize = vectorize
        gradients, losses = objective.gradients(tree.stack(params, 2), x, y)
        products = objective.hessian_products(tree.stack(params, 2), x, y, vectors)
        for t in range(2):
            loss = loss_of(network, x[t], y[t])
            torch.testing.assert_close(losses[t], loss, rtol=1e-12, atol=0)
            first = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
            along = sum((g * vectors[name][t]).sum() for g, name in zip(first, params, strict=True))
            second = torch.autograd.grad(along, list(network.parameters()), allow_unused=True)
            for name, g, h in zip(params, first, second, strict=True):
                torch.testing.assert_close(gradients[name][t], g, rtol=1e-8, atol=1e-12)
                h = torch.zeros_like(g) if h is None else h
                torch.testing.assert_close(products[name][t], h, rtol=1e-7, atol=1e-9)


def test_every_parameter_is_learnt():
    (x, y), network = tasks(), small()
    assert all(g.abs().max() > 1e-9 for g in gradient_of(network, x[0], y[0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet12(ways=0), "ways=0 must be at least 1"),
        (lambda: ResNet12(in_channels=0), "in_channels=0 must be at least 1"),
        (lambda: ResNet12(eps=-1.0), "eps=-1.0 must not be negative"),
        (lambda: ResNet12(widths=(8, 8, 8)), r"widths=\[8, 8, 8\]: ResNet12 has four blocks"),
        (lambda: ResNet12(widths=(8, 8, 8, 0)), "widths=0 must be at least 1"),
        (lambda: ResNet12(widths=SMALL)(torch.zeros(2, 3, 32, 15)), "are 32x15 pixels, but ResNet12 needs 16x16"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
