"""Small learners, their data and trainers."""

import lightning as L
import torch
from torch import nn

from fomal.data.images.class_images import ClassImages, ImageDataModule
from fomal.inner import Adam
from fomal.learner.meta_learner import MetaLearner
from fomal.models import MLP, BatchNorm, Conv4
from fomal.outer import Reptile
from tests.helpers.groups import grouped


class Blobs(ImageDataModule):
    """Random images: each class has a pattern of its own, each image noise on it."""

    def __init__(self, **settings):
        defaults = {"ways": 3, "shots": 2, "train_shots": 4, "meta_batch_size": 4, "rotations": True}
        super().__init__(**{**defaults, **settings})

    def load(self):
        generator = torch.Generator().manual_seed(0)
        pattern = torch.rand(12, 1, 1, 9, 9, generator=generator)
        noise = torch.rand(12, 8, 1, 9, 9, generator=generator)
        images = ((0.7 * pattern + 0.3 * noise) * 255).to(torch.uint8).flatten(0, 1)
        return dict.fromkeys(("train", "val", "test"), ClassImages.of(images, torch.full((12,), 8)))

    def preprocess(self, x):
        return x.float() / 255


def sine_learner(rule=None, inner=None, network=None, **settings):
    torch.manual_seed(0)
    network = network or MLP(hidden=(16,))
    defaults = {"train": {"steps": 3, "batch_size": 5}, "eval": {"steps": 4, "batch_size": 10}}
    return MetaLearner(network, rule or Reptile(), inner or Adam(0.01), **grouped(defaults, settings))


def blob_learner(rule=None, inner=None, network=None, **settings):
    torch.manual_seed(0)
    network = network or Conv4(3, image_size=9, filters=8)
    defaults = {"train": {"steps": 3, "batch_size": 6}, "eval": {"steps": 4, "batch_size": 3}}
    return MetaLearner(network, rule or Reptile(), inner or Adam(0.01), **grouped(defaults, settings))


def trainer(steps=4, **settings):
    defaults = {
        "max_steps": steps,
        "max_epochs": -1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "check_val_every_n_epoch": None,
        "val_check_interval": 1000,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**{**defaults, **settings})


def weights(learner):
    return {name: value.clone() for name, value in learner.network.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class StopAfter(L.Callback):
    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.steps


def smooth_learner(rule, inner):
    """Without the bends of ReLU, beyond which second derivatives in few digits mean little; no gradient is zero."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, 2, bias=False), BatchNorm(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    return blob_learner(rule, inner, network)
