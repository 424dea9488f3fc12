import numpy as np
import pytest
import torch
from torch import nn

from fomal.models import MLP, BatchNorm, Conv4
from fomal.models.norm import use_batch_statistics


def test_the_omniglot_form_has_the_sizes_of_the_released_network():
    network = Conv4(ways=5)
    x, sizes = torch.zeros(2, 1, 28, 28), []
    for block in network.blocks:
        x = block(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(64, 14, 14), (64, 7, 7), (64, 4, 4), (64, 2, 2)]
    assert network.head.in_features == 256
    convolutions = 9 * 64 * (1 + 3 * 64)
    assert sum(p.numel() for p in network.parameters()) == convolutions + 4 * 2 * 64 + 257 * 5


def test_the_mini_imagenet_form_has_the_sizes_of_the_released_network():
    network = Conv4(ways=5, in_channels=3, image_size=84, filters=32, downsample="pool")
    x, sizes = torch.zeros(2, 3, 84, 84), []
    for block in network.blocks:
        x = block(x)
        sizes.append(x.shape[-1])
    assert sizes == [42, 21, 11, 6]
    assert network.head.in_features == 32 * 36


@pytest.mark.parametrize("size", [7, 8, 14, 28])
def test_tensorflow_padding_puts_the_odd_zero_right_and_below(size):
    """Against the definition: output o reads inputs 2 o - before .. 2 o - before + 2."""
    block = Conv4(image_size=size, filters=2).double().blocks[0]
    x = torch.rand(1, 1, size, size, dtype=torch.float64)
    out = -(-size // 2)
    before = max((out - 1) * 2 + 3 - size, 0) // 2
    padded = np.zeros((size + 4, size + 4))
    padded[before : before + size, before : before + size] = x[0, 0].numpy()
    kernel = block.conv.weight.detach().numpy()
    expected = np.array(
        [
            [
                [(padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3] * kernel[f, 0]).sum() for j in range(out)]
                for i in range(out)
            ]
            for f in range(2)
        ]
    )
    found = []
    block.norm.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    block(x)
    np.testing.assert_allclose(found[0][0].detach().numpy(), expected, atol=1e-12)


def test_the_released_initialisation_is_glorot_uniform():
    torch.manual_seed(0)
    network = Conv4(ways=5)
    weight = network.blocks[1].conv.weight
    bound = (6 / (9 * 64 + 9 * 64)) ** 0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not network.head.bias.any()
    assert Conv4(init="torch").head.bias.any()


def test_symmetric_padding_is_torchs_own():
    block = Conv4(padding="symmetric", image_size=28).blocks[0]
    assert block.conv.padding == (1, 1)
    assert Conv4(padding="symmetric")(torch.zeros(2, 1, 28, 28)).shape == (2, 5)


@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 5), (4, 3, 5, 6)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_uses_batch_statistics_in_training_and_evaluation(shape, training):
    norm = BatchNorm(3, eps=1e-3).double().train(training)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    x = torch.randn(shape, dtype=torch.float64)
    dims = [0, *range(2, len(shape))]
    view = (1, -1, *[1] * (len(shape) - 2))
    centred = (x - x.mean(dims, keepdim=True)) / (x.var(dims, correction=0, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), centred * norm.weight.view(view) + norm.bias.view(view))


def test_batch_norm_is_right_under_autocast():
    norm = BatchNorm(4)
    x = (100 + torch.randn(64, 4)).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), norm(x.float()), rtol=0.01, atol=0.01)


def test_torchs_batch_norm_is_replaced_with_its_parameters_kept():
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2, eps=0.1), nn.BatchNorm2d(2, affine=False))
    )
    weight = network[1][0].weight
    assert use_batch_statistics(network) == ["1.0", "1.1"]
    assert network[1][0].weight is weight
    assert network[1][0].eps == 0.1
    assert network[1][1].weight is None


def test_mlp_is_the_papers_network_by_default():
    network = MLP()
    assert [tuple(p.shape) for p in network.parameters()] == [(64, 1), (64,), (64, 64), (64,), (1, 64), (1,)]
    linear = list(network.layers)[1::2]
    x = torch.randn(7, 1)
    expected = linear[2](torch.tanh(linear[1](torch.tanh(linear[0](x)))))
    torch.testing.assert_close(network(x), expected)
    assert MLP(in_features=12, hidden=())(torch.zeros(2, 3, 4)).shape == (2, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv4(ways=0), "ways=0 must be at least 1"),
        (lambda: Conv4(downsample="sride"), "downsample='sride' is unknown: use one of stride, pool"),
        (lambda: MLP(activation="sin"), "activation='sin' is unknown: use one of tanh, relu, gelu"),
        (lambda: MLP(hidden=(0,)), "hidden=0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("downsample", ["stride", "pool"])
@pytest.mark.parametrize("padding", ["tensorflow", "symmetric"])
def test_conv4_takes_images_that_are_not_square(downsample: str, padding: str) -> None:
    network = Conv4(3, 1, (9, 20), filters=2, downsample=downsample, padding=padding)
    assert network(torch.rand(4, 1, 9, 20)).shape == (4, 3)
    turned = Conv4(3, 1, (20, 9), filters=2, downsample=downsample, padding=padding)
    for block, other in zip(network.blocks, turned.blocks, strict=True):
        other.conv.weight.data = block.conv.weight.data.mT
    x = torch.rand(4, 1, 9, 20)
    torch.testing.assert_close(turned.blocks(x.mT), network.blocks(x).mT)
