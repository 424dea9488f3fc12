import logging
import sys

import pytest
import torch
import yaml
from torch import nn
from torchvision import models
from torchvision.ops import StochasticDepth

from fomal.cli import main
from fomal.data.images.class_images import ClassImages, ImageDataModule
from fomal.inner import SGD
from fomal.inner.objective import Objective
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import Execution, InnerSchedule
from fomal.models import MLP, Classifier, Conv4, ResNet12, find_head, mean_rows, resize_head
from fomal.models.classifier import _StochasticDepth
from fomal.models.norm import use_batch_statistics
from fomal.outer import Reptile
from fomal.utils import tree
from tests.helpers.learners import trainer

HEADS = {
    "resnet18": "fc",
    "mobilenet_v3_small": "classifier.3",
    "squeezenet1_1": "classifier.1",
    "shufflenet_v2_x0_5": "fc",
    "densenet121": "classifier",
    "efficientnet_b0": "classifier.1",
}
LARGE = {
    "vgg11_bn": ("classifier.6", {}),
    "convnext_tiny": ("classifier.2", {}),
    "swin_t": ("head", {}),
    "vit_b_16": ("heads.head", {"image_size": 64}),
    "googlenet": ("fc", {"aux_logits": False, "init_weights": False}),
}


def classifier(name, ways=3, **options):
    torch.manual_seed(0)
    return Classifier(f"torchvision.models.{name}", ways, options)


def images(size=32, tasks=2):
    """(T, 4, 3, size, size) and labels (T, 4)."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(tasks, 4, 3, size, size, generator=generator), torch.tensor([0, 1, 2, 0]).expand(tasks, -1)


# -- classifiers of torchvision and timm


def assert_is_torchvisions(name, head, size, **options):
    """Torchvision's own network made with as many classes, given the same weights, is the oracle."""
    network = classifier(name, **options)
    assert find_head(network) == f"network.{head}"
    x = images(size)[0][0]
    with torch.no_grad():
        expected = getattr(models, name)(num_classes=3, **options)
        expected.load_state_dict(network.network.state_dict())
        logits = network.eval()(x)
        assert logits.shape == (4, 3)
        torch.testing.assert_close(logits, expected.eval()(x))


def assert_trains_vectorised(network, size):
    """In training, as in the inner loop, and settled without a word."""
    use_batch_statistics(network)
    params, objective, (x, y) = tree.detach(dict(network.named_parameters())), Objective(network), images(size)
    objective.settle(params, x, y)
    assert objective.vectorize
    network.train()
    gradients, losses = objective.gradients(tree.stack(params, 2), x, y)
    assert losses.isfinite().all()
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("name", HEADS)
def test_a_classifier_is_torchvisions_with_a_head_for_the_ways(name):
    assert_is_torchvisions(name, HEADS[name], 32)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1", "efficientnet_b0"])
def test_small_classifiers_train_vectorised(name):
    assert_trains_vectorised(classifier(name), 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_classifiers_train_vectorised(name):
    head, options = LARGE[name]
    assert_is_torchvisions(name, head, 64, **options)
    assert_trains_vectorised(classifier(name, **options), 64)


def test_all_but_the_head_is_as_the_factory_makes_it():
    network = classifier("resnet18", ways=7).network
    torch.manual_seed(0)
    for name, value in models.resnet18().state_dict().items():
        if name.startswith("fc."):
            assert network.state_dict()[name].shape == (7, *value.shape[1:])
            assert (network.state_dict()[name].std(0) > 0).all()  # initialised anew
        else:
            assert torch.equal(network.state_dict()[name], value), name


@pytest.mark.parametrize("model_name", ["resnet10t", "mobilenetv3_small_050"])
def test_a_classifier_of_timm_keeps_its_activations(model_name):
    """timm fuses some with batch norm, which the learner replaces; timm's own network in training is the oracle."""
    timm = pytest.importorskip("timm", reason="needs timm: pip install timm")
    torch.manual_seed(0)
    network = Classifier("timm.create_model", 3, {"model_name": model_name, "drop_rate": 0.0})
    expected = timm.create_model(model_name, num_classes=3, drop_rate=0.0)
    with torch.no_grad():
        for ours, theirs in zip(network.parameters(), expected.parameters(), strict=True):
            theirs.copy_(ours)
        use_batch_statistics(network)
        x = images(64)[0][0]
        torch.testing.assert_close(network(x), expected.train()(x), rtol=1e-4, atol=1e-5)
    assert_trains_vectorised(network, 32)


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not there
    with pytest.raises(ValueError, match="there is no module 'timm': pip install timm"):
        Classifier("timm.create_model", 3, {"model_name": "resnet18"})


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x):
        logits = self.head(x.flatten(1))
        return logits, logits


def test_a_network_with_further_outputs_is_refused():
    with pytest.raises(ValueError, match="returns a tuple rather than logits"):
        Classifier(f"{__name__}.Two")(images()[0][0])


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("resnet18", {}, "factory='resnet18' is no import path: write e.g. torchvision.models.resnet18"),
        ("torchvision..resnet18", {}, "is no import path"),
        ("torchvision.modles.resnet18", {}, "there is no module 'torchvision.modles': check its spelling"),
        ("torchvision.models.resnet81", {}, "has no 'resnet81' - did you mean torchvision.models.resnet18 or"),
        ("torchvision.models.zzz", {}, "torchvision.models has no 'zzz'."),
        ("torchvision.models.resnet", {}, "factory='torchvision.models.resnet' is a module: name a function or class"),
        ("torchvision.models.resnet18", {"weight": None}, r"options=\{'weight': None\} fails: .* 'weight'"),
        ("torchvision.models.resnet18", {"weights": "BEST"}, "fails: 'BEST'"),
        ("math.sqrt", {"x": 4}, "factory='math.sqrt' is not called, since nothing says that it makes a network"),
        ("builtins.dict", {"x": 4}, "factory='builtins.dict' is not called, since nothing says that it makes"),
        ("torch.nn.ReLU", {}, "ReLU has no head"),
        ("torchvision.models.googlenet", {"init_weights": False}, r"set options: \{aux_logits: false\}"),
        ("fomal.models.MLP", {"hidden": [6, 6], "out_features": 6}, "MLP without a single head: 3 layers have 6"),
    ],
)
def test_what_is_no_classifier_is_refused(factory, options, message):
    with pytest.raises(ValueError, match=message):
        Classifier(factory, 3, options)


def test_ways_are_checked():
    with pytest.raises(ValueError, match="ways=0 must be at least 1"):
        Classifier("torchvision.models.resnet18", 0)


# -- stochastic depth


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth_is_torchvisions_in_distribution(mode):
    x = torch.rand(2000, 3) + 1
    ours, theirs = _StochasticDepth(0.3, mode), StochasticDepth(0.3, mode)
    assert torch.equal(ours.eval()(x), x)
    torch.manual_seed(0)
    for depth in (ours.train(), theirs.train()):
        if mode == "row":
            y = depth(x)
            kept = y[:, 0] != 0
        else:
            y = torch.stack([depth(row[None])[0] for row in x])
            together = depth(x)
            kept = y[:, 0] != 0
            assert torch.equal(together, torch.zeros_like(x)) or not (together == 0).any()
        torch.testing.assert_close(y, torch.where(kept[:, None], x / 0.7, 0))
        assert kept.float().mean().item() == pytest.approx(0.7, abs=4 * (0.21 / 2000) ** 0.5)


def test_stochastic_depth_draws_for_each_task_of_its_own():
    x = torch.ones(4, 64, 1, dtype=torch.bfloat16)
    depth = torch.func.vmap(_StochasticDepth(0.5, "row"), randomness="different")
    torch.manual_seed(0)
    first = depth(x)
    torch.manual_seed(0)
    assert torch.equal(depth(x), first)
    assert first.dtype == torch.bfloat16
    assert len({tuple(task.flatten().tolist()) for task in first}) == 4


# -- through the learner and the command line


class Colours(ImageDataModule):
    """Random 32x32 images in colour: each class has a colour of its own, each image noise on it."""

    def load(self):
        generator = torch.Generator().manual_seed(0)
        colour, noise = (torch.rand(6, n, 3, s, s, generator=generator) for n, s in ((1, 1), (8, 32)))
        pixels = ((0.7 * colour + 0.3 * noise) * 255).to(torch.uint8).flatten(0, 1)
        return dict.fromkeys(("train", "val", "test"), ClassImages.of(pixels, torch.full((6,), 8)))

    def preprocess(self, x):
        return x.float() / 255


def test_a_meta_iteration_moves_a_resnet18_as_a_loop_over_tasks_does(caplog):
    moved = []
    for vectorize in (None, False):
        learner = MetaLearner(
            classifier("resnet18").double(),
            Reptile(),
            SGD(0.01),
            train=InnerSchedule(1, 3),
            execution=Execution(vectorize=vectorize),
        )
        before = {name: value.clone() for name, value in learner.initialisation().items()}
        data = Colours(ways=3, shots=1, train_shots=1, meta_batch_size=2)
        with caplog.at_level(logging.WARNING):
            trainer(1, precision="64-true").fit(learner, datamodule=data)
        assert learner.objective.vectorize is (vectorize is None)
        moved.append({name: value - before[name] for name, value in learner.initialisation().items()})
    assert not [record for record in caplog.records if record.name.startswith("fomal")]
    for name, displacement in moved[0].items():
        assert displacement.abs().max() > 0
        torch.testing.assert_close(displacement, moved[1][name], rtol=1e-6, atol=1e-9)


def test_it_is_configured_from_yaml(tmp_path, capsys, fails):
    network = {
        "class_path": "fomal.models.Classifier",
        "init_args": {
            "factory": "torchvision.models.resnet18",
            "options": {"weights": None, "zero_init_residual": True},
        },
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": {"network": network}}))
    args = ["--config", "omniglot/20way_1shot_reptile", "--config", str(tmp_path / "c.yaml")]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["network"]
    assert printed["class_path"] == network["class_path"]
    assert network["init_args"].items() <= printed["init_args"].items()
    message = fails("fit", *args, "--model.network.options", "{weight: null}", code=1)
    assert message.startswith("factory='torchvision.models.resnet18' with options={'weight': None} fails")


# -- heads


@pytest.mark.parametrize(
    ("network", "head"),
    [
        (Conv4(), "head"),
        (ResNet12(widths=(2, 2, 2, 2)), "head"),
        (MLP(), "layers.5"),
        (nn.Linear(2, 3), ""),
        (nn.Sequential(nn.Linear(2, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, groups=2)), "0"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_head_is_the_last_layer_that_can_be_one(network, head):
    assert find_head(network) == head


def test_the_head_is_found_by_its_outputs_where_they_are_known():
    network = nn.ModuleDict({"head": nn.Linear(8, 5), "features": nn.Linear(4, 8)})  # registered the other way round
    assert find_head(network, ways=5) == "head"
    assert resize_head(network, 3, name="head") == "head"
    assert network["features"].out_features == 8
    with pytest.raises(ValueError, match=r"ModuleDict has no head, no .* with 7 outputs"):
        find_head(network, ways=7)


class Scaled(nn.Linear):
    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias)
        self.scale = nn.Parameter(torch.tensor([2.0, 1.0]))

    def forward(self, x):
        return self.scale.sum() * super().forward(x)


def heads():
    torch.manual_seed(0)
    return {
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(12, 4)),
        "no bias": nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False)),
        "convolution": nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2)),
        "subclass": nn.Sequential(nn.Flatten(), Scaled(12, 4)),
    }


@pytest.mark.parametrize("kind", heads())
@pytest.mark.parametrize("ways", [2, 4, 9])
def test_a_mean_head_gives_every_class_the_mean_logit(kind, ways):
    network, x = heads()[kind].double(), torch.rand(5, 3, 2, 2, dtype=torch.float64)
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    mean = network(x).mean(1, keepdim=True)
    name = resize_head(network, ways)
    logits = network(x)
    assert logits.shape[1] == ways
    torch.testing.assert_close(logits, mean.expand_as(logits))
    head = network.get_submodule(name)
    assert repr(head) == repr(type(head)(**_settings(head, ways)))
    assert all(p.is_leaf and p.requires_grad is (p.dim() == 1) for p in network.parameters())
    with torch.no_grad():
        head.weight[0] += 1  # the rows are apart
        assert (network(x)[:, 0] > network(x)[:, 1]).all()


def _settings(head, ways):
    if isinstance(head, nn.Linear):
        return {"in_features": 12, "out_features": ways, "bias": head.bias is not None}
    return {"in_channels": 3, "out_channels": ways, "kernel_size": 1}


def test_a_new_head_is_initialised_as_torch_does():
    network = MLP(out_features=4).double()
    torch.manual_seed(3)
    resize_head(network, 6, "new")
    torch.manual_seed(3)
    expected = nn.Linear(64, 6, dtype=torch.float64)
    assert torch.equal(network.layers[5].weight, expected.weight)
    assert torch.equal(network.layers[5].bias, expected.bias)


def test_moments_of_the_head_are_resized_alike():
    network = Conv4(ways=4)
    moments = torch.rand_like(network.head.weight)
    expected = torch.stack([moments.mean(0)] * 6)
    torch.testing.assert_close(mean_rows(moments, 6), expected)
    assert torch.equal(mean_rows(torch.tensor([1.0, 3.0]), 3), torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resize_head(nn.Sequential(nn.ReLU()), 3), "Sequential has no head, no torch.nn.Linear or 1x1"),
        (lambda: resize_head(MLP(), 0), "ways=0 must be at least 1"),
        (lambda: resize_head(MLP(), 3, "zero"), "init='zero' is unknown: use one of mean, new"),
        (lambda: resize_head(MLP(), 3, name="layers.2"), "name='layers.2' is a Tanh: name a torch.nn.Linear"),
        (
            lambda: resize_head(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), 3),
            "the weight of '' is computed from others",
        ),
    ],
)
def test_what_cannot_be_resized_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
