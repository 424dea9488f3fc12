"""Tasks of learn2learn as episodes, against learn2learn's own sampling and partition."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import runpy
import sys
import zipfile
from itertools import islice
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import requests
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.datasets import Omniglot

from fomal.cli import main
from fomal.data import taskset as module
from fomal.data.taskset import BENCHMARKS, TasksetDataModule
from fomal.inner import Adam
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import InnerSchedule
from fomal.models import MLP
from fomal.outer import Reptile
from fomal.tasks.datamodule import EpisodeStream
from fomal.tasks.sampler import task_words

WAYS, SHOTS, QUERIES = 3, 2, 2


@pytest.fixture(scope="module")
def l2l():
    """learn2learn, imported only here because that takes seconds."""
    return pytest.importorskip("learn2learn")


# -- a toy: 8 classes of 6 points (label, number, jitter); the jitter comes from all three random generators


class Jitter:
    def __call__(self, description):
        for example in description:
            example.transforms.append(self.add)
        return description

    def add(self, example):
        x, y = example
        noise = random.random() + np.random.random() + torch.rand(()).item()  # noqa: NPY002
        return torch.cat([x, torch.tensor([noise])]), y


def toy(l2l, num_tasks=-1, examples=SHOTS + QUERIES):
    labels = torch.arange(10, 18).repeat(6)
    data = l2l.data.MetaDataset(TensorDataset(torch.stack([labels.float(), torch.arange(48.0)], -1), labels))
    transforms = [
        l2l.data.transforms.NWays(data, WAYS),
        l2l.data.transforms.KShots(data, examples),
        l2l.data.transforms.LoadData(data),
        l2l.data.transforms.RemapLabels(data),
        Jitter(),
    ]
    return l2l.data.Taskset(data, transforms, num_tasks=num_tasks)


def toy_module(l2l, num_tasks=-1, seed=0, **settings):
    tasksets = {split: toy(l2l, num_tasks) for split in ("train", "val", "test")}
    sizes = {"ways": WAYS, "shots": SHOTS, "query_shots": QUERIES, "train_query_shots": QUERIES, "meta_batch_size": 2}
    return TasksetDataModule(tasksets=tasksets, seed=seed, **{**sizes, **settings})


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one[:5], other[:5], strict=True))


@pytest.mark.parametrize("num_tasks", [-1, 7])
def test_an_episode_is_what_learn2learn_draws_and_partitions(l2l, num_tasks):
    numbers = torch.tensor([0, 12, 2**33 + 5])
    episode = toy_module(l2l, num_tasks, seed=9).episodes("val", numbers).check()
    assert episode.support_x.shape == (3, WAYS * SHOTS, 3)
    assert episode.support_x.dtype == torch.float32
    for t, number in enumerate(numbers.tolist()):
        place = number if num_tasks == -1 else number % num_tasks
        a, b, c, d, e, f = task_words(9, 1, torch.tensor([place]), 6)[0].tolist()
        taskset = toy(l2l, num_tasks)
        random.seed(a * 2**32 + b)
        np.random.seed([c, d])  # noqa: NPY002
        torch.manual_seed(e * 2**32 + f)
        x, y = taskset.sample() if num_tasks == -1 else taskset[place]
        support, query = l2l.data.partition_task(x, y, shots=SHOTS)
        expected = (*support, *query)
        assert all(torch.equal(found[t], wanted) for found, wanted in zip(episode[:4], expected, strict=True))


@pytest.mark.parametrize("num_tasks", [-1, 7])
def test_episodes_do_not_depend_on_batches_order_or_what_was_drawn_before(l2l, num_tasks):
    data = toy_module(l2l, num_tasks)
    many = data.episodes("train", torch.arange(9))
    _ = data.tasksets["train"][3]  # learn2learn keeps the description of this task, where tasks are finite
    for number in reversed(range(9)):
        assert same(data.episodes("train", torch.tensor([number])), many.select(torch.tensor([number])))
    again = toy_module(l2l, num_tasks).episodes("train", torch.arange(9))  # a restart
    assert same(again, many)
    assert torch.equal(many.support_x[7], many.support_x[0]) == (num_tasks == 7)
    others = [
        data.episodes("val", torch.arange(9)),
        toy_module(l2l, num_tasks, seed=1).episodes("train", torch.arange(9)),
    ]
    assert all((other.support_x != many.support_x).flatten(1).any(1).all() for other in others)


def test_the_stream_is_the_same_in_worker_processes_and_after_a_restart(l2l):
    streams = [list(islice(iter(toy_module(l2l, num_workers=w).train_dataloader()), 4)) for w in (0, 2)]
    resumed = islice(iter(EpisodeStream(toy_module(l2l), "train", 2, start=2)), 2)
    assert [episode.number.tolist() for episode in streams[0]] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert all(same(*pair) for pair in zip(*streams, strict=True))
    assert all(same(*pair) for pair in zip(streams[0][2:], resumed, strict=True))


class Failing:
    def sample(self):
        random.random()
        torch.rand(())
        np.random.random()  # noqa: NPY002
        raise OSError("no disk")


def test_the_callers_random_numbers_are_left_alone(l2l):
    def state():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002

    data = toy_module(l2l)
    data.tasksets["test"] = Failing()
    before = state()
    data.episodes("train", torch.arange(3))
    with pytest.raises(OSError, match="no disk"):
        data.episodes("test", torch.arange(3))
    assert state() == before


def test_every_class_and_example_is_drawn(l2l):
    episode = toy_module(l2l).episodes("train", torch.arange(400))
    for x in (episode.support_x, episode.query_x):
        labels, counts = x[..., 0].unique(return_counts=True)
        assert labels.tolist() == list(range(10, 18))
        expected = x[..., 0].numel() / 8
        assert (counts - expected).abs().max() < 5 * expected**0.5
    assert len(episode.support_x[..., 1].unique()) == 48
    # The two parts of a task hold the same classes, and no example twice.
    assert torch.equal(episode.support_x[:, ::SHOTS, 0], episode.query_x[:, ::QUERIES, 0])
    both = torch.cat([episode.support_x, episode.query_x], 1)[..., 1].sort(1).values
    assert (both.diff(dim=1) > 0).all()


class Endless:
    """Labels in disorder, of any integer type, and more examples than are wanted."""

    def sample(self):
        y = torch.tensor([7, -1, 4, 4, 7, -1, -1, 7, 4, 7, 7, -1], dtype=torch.int16)
        return torch.arange(12).view(12, 1, 1).numpy(), y


@pytest.mark.parametrize("taskset", [Endless(), [Endless().sample()] * 2], ids=["sample", "getitem"])
def test_tasks_of_any_sampler_are_put_in_order_of_class(taskset):
    data = TasksetDataModule(tasksets={"train": taskset}, ways=3, train_shots=2, train_query_shots=1)
    data.setup()
    episode = data.episodes("train", torch.arange(2)).check()
    assert episode.support_x.flatten(1).tolist() == [[1, 5, 2, 3, 0, 4]] * 2
    assert episode.support_y.tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    assert episode.query_x.flatten(1).tolist() == [[6, 8, 7]] * 2
    assert episode.query_y.tolist() == [[0, 1, 2]] * 2


def test_a_learner_trains_on_a_taskset(l2l, tmp_path):
    learner = MetaLearner(MLP(3, WAYS, hidden=[8]), Reptile(), Adam(lr=0.01), train=InnerSchedule(3, 4))
    before = [p.clone() for p in learner.network.parameters()]
    trainer = L.Trainer(
        max_steps=2,
        max_epochs=-1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(learner, datamodule=toy_module(l2l, val_tasks=3))
    assert trainer.global_step == 2
    assert 0 <= trainer.callback_metrics["val/accuracy"] <= 1
    assert all((a != b).any() and b.isfinite().all() for a, b in zip(before, learner.network.parameters(), strict=True))


# -- mistakes


TASK = (torch.zeros(6, 2), torch.tensor([0, 0, 0, 1, 1, 1]))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "benchmark=None without tasksets: give either benchmark, one of omniglot, mini-imagenet"),
        (
            {"benchmark": "fc100", "tasksets": {"val": [TASK]}},
            ValueError,
            "benchmark=fc100 beside tasksets: give either",
        ),
        ({"benchmark": "cub"}, ValueError, "benchmark='cub' is unknown: use one of omniglot"),
        ({"benchmark": "fc100", "num_tasks": 0}, ValueError, "num_tasks=0 must be at least 1"),
        ({"benchmark": "fc100", "ways": 1}, ValueError, "ways=1 must be at least 2: with one class"),
        ({"benchmark": "omniglot", "partition_seed": -1}, ValueError, "partition_seed=-1 must not be negative"),
        ({"tasksets": {"dev": [TASK]}}, ValueError, "split='dev' is unknown: use one of train, val, test"),
        ({"tasksets": {"val": 3}}, TypeError, r"tasksets\['val'\] is a int: give a learn2learn Taskset, or an object"),
        ({"tasksets": {"val": [TASK]}, "ways": 3}, ValueError, r"task 0 of the val .*has 2 classes\).* ways=3 classes"),
        (
            {"tasksets": {"val": [TASK]}, "shots": 3},
            ValueError,
            r"label 0 has 3 .* shots=3 plus query_shots=1 examples",
        ),
        (
            {"tasksets": {"train": [TASK]}, "train_shots": 4},
            ValueError,
            "train_shots=4 plus train_query_shots=0 .*; change these",
        ),
        ({"tasksets": {"val": [(TASK[0], TASK[1][:, None])]}}, ValueError, r"y \(6, 1\) rather than \(n, ...\) and"),
    ],
)
def test_mistakes_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        TasksetDataModule(**{"ways": 2, **settings}).setup()


def test_a_taskset_that_cannot_draw_so_many_is_refused(l2l):
    with pytest.raises(
        ValueError, match=r"task 0 of the test taskset .*[Ss]ample larger than population.* change these"
    ):
        TasksetDataModule(tasksets={"test": toy(l2l, examples=9)}, ways=WAYS).setup()


def test_a_split_without_taskset_is_named():
    with pytest.raises(ValueError, match=r"no taskset for the test split: give tasksets\['test'\]"):
        TasksetDataModule(tasksets={"val": [TASK]}, ways=2).episodes("test", torch.arange(2))
    with pytest.raises(ValueError, match=r"no taskset for the test split: call setup\(\) first"):
        TasksetDataModule("fc100").episodes("test", torch.arange(2))


def test_learn2learn_is_imported_for_benchmarks_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "learn2learn", None)  # importing it fails
    fresh = runpy.run_path(module.__file__)["TasksetDataModule"]
    fresh(tasksets={"val": [TASK]}, ways=2).setup()
    with pytest.raises(ModuleNotFoundError, match=r"benchmark='omniglot' needs .* `pip install fomal\[learn2learn\]`"):
        fresh("omniglot").prepare_data()


# -- benchmarks, from small files in the formats that learn2learn reads; an image has one shade, its class's


def png(shade, size, mode="RGB"):
    content = io.BytesIO()
    Image.new(mode, (size, size), shade if mode == "L" else (shade,) * 3).save(content, "png")
    return content.getvalue()


def omniglot(root, monkeypatch, drawings, characters=200):
    """Characters of grey 1 .. `characters`, half of them in each part."""
    folder = root / "omniglot-py"
    for part, shades in enumerate(np.split(np.arange(1, characters + 1), 2)):
        name = ("images_background", "images_evaluation")[part]
        for shade in shades:
            place = folder / name / "Latin" / f"character{shade:03}"
            place.mkdir(parents=True)
            for drawing in range(drawings):
                (place / f"{drawing}.png").write_bytes(png(int(shade), 28, "L"))
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            archive.writestr("here", str(part))
        digest = hashlib.md5((folder / f"{name}.zip").read_bytes()).hexdigest()
        monkeypatch.setitem(Omniglot.zips_md5, name, digest)
    return root


def lay_out(name, root, monkeypatch):
    """Four classes of five images in each split, of shades that occur in no other."""
    if name == "omniglot":
        return omniglot(root, monkeypatch, drawings=5)
    size = 32 if name in ("fc100", "cifarfs") else 84
    for place, split in enumerate(("train", "validation", "test")):
        short = "val" if split == "validation" else split
        shades = 20 * np.arange(1, 5) + 80 * place
        labels = np.tile(np.arange(4), 5)
        images = np.broadcast_to(shades[labels][:, None, None, None].astype(np.uint8), (20, size, size, 3)).copy()
        if name == "mini-imagenet":
            classes = {f"n{c}": np.flatnonzero(labels == c).tolist() for c in range(4)}
            files = {f"mini-imagenet-cache-{split}.pkl": {"image_data": images, "class_dict": classes}}
        elif name == "tiered-imagenet":
            pngs = [np.frombuffer(png(int(shades[c]), size), np.uint8) for c in labels]
            files = {f"{short}_images_png.pkl": pngs, f"{short}_labels.pkl": {"label_specific": labels}}
            files = {f"tiered-imagenet/{file}": content for file, content in files.items()}
        elif name == "fc100":
            files = {f"FC100_{short}.pickle": {"data": images, "labels": labels.tolist()}}
        else:
            files = {}
            for i, c in enumerate(labels):
                folder = root / "cifarfs" / "processed" / short / f"class{c}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{i}.png").write_bytes(png(int(shades[c]), size))
        for file, content in files.items():
            (root / file).parent.mkdir(exist_ok=True)
            (root / file).write_bytes(pickle.dumps(content))
    return root


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_read_by_learn2learn(name, l2l, tmp_path, monkeypatch):
    root = lay_out(name, tmp_path, monkeypatch)
    sizes = {"ways": 3, "shots": 1, "query_shots": 3, "train_shots": 4, "train_query_shots": 1}
    data = TasksetDataModule(name, root=str(root), num_tasks=6, **sizes)
    data.prepare_data()
    data.setup()
    shape = {"omniglot": (1, 28, 28), "fc100": (3, 32, 32), "cifarfs": (3, 32, 32)}.get(name, (3, 84, 84))
    seen = {}
    for split, (support, query) in {"train": (4, 1), "val": (1, 3), "test": (1, 3)}.items():
        episode = data.episodes(split, torch.arange(10)).check()
        assert episode.support_x.shape == (10, 3 * support, *shape)
        assert episode.query_x.shape == (10, 3 * query, *shape)
        assert torch.equal(episode.support_x[6], episode.support_x[0])
        assert not torch.equal(episode.support_x[1], episode.support_x[0])
        assert episode.support_x.dtype == torch.float32
        assert episode.support_x.min() >= 0
        assert episode.support_x.max() <= 1
        # Both parts of a task show the same three classes in the same order.
        middle = shape[1] // 2
        shades = [
            x[:, :, 0, middle, middle].mul(255).round().view(10, 3, -1) for x in (episode.support_x, episode.query_x)
        ]
        assert torch.equal(shades[0][..., :1].expand_as(shades[0]), shades[0])
        assert torch.equal(shades[0][..., :1].expand_as(shades[1]), shades[1])
        seen[split] = set(shades[0].flatten().tolist())
    assert len(seen["train"] | seen["val"] | seen["test"]) == sum(map(len, seen.values())) > 8


def test_omniglots_splits_share_no_character_and_do_not_depend_on_the_file_system(l2l, tmp_path, monkeypatch):
    root = omniglot(tmp_path, monkeypatch, drawings=2)

    def characters(**settings):
        data = TasksetDataModule("omniglot", root=str(root), ways=2, shots=1, **settings)
        data.setup()
        drawn = {s: data.episodes(s, torch.arange(80)).support_x[..., 14, 14] for s in ("train", "val", "test")}
        return {split: set((255 - 255 * x).round().int().flatten().tolist()) for split, x in drawn.items()}

    splits = characters()
    assert len(set.union(*splits.values())) == sum(map(len, splits.values()))
    assert len(splits["train"]) > 80
    assert len(splits["test"]) > 30
    assert characters(seed=1)["val"] == splits["val"] != characters(partition_seed=1)["val"]
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda *args: sorted(listed(*args), reverse=True))
    (root / "omniglot-bookkeeping.pkl").unlink()
    assert characters() == splits


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_is_missing_is_named_and_nothing_is_fetched_unasked(name, l2l, tmp_path, monkeypatch):
    root = tmp_path / "absent"
    with pytest.raises(
        FileNotFoundError, match=rf"absent' lacks {BENCHMARKS[name][0][0]}.*={name!r}.*data.download: true"
    ):
        TasksetDataModule(name, root=str(root)).prepare_data()
    assert not root.exists()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_download_that_fails_is_explained(name, l2l, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests.Session, "request", offline)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(
        RuntimeError, match=rf"={name!r} from root='.*new/folder' .*no network\).* links may be dead.* or use"
    ):
        TasksetDataModule(name, root=str(tmp_path / "new" / "folder"), download=True).prepare_data()


def test_the_config_runs(l2l, tmp_path, monkeypatch):
    root = omniglot(tmp_path / "data", monkeypatch, drawings=10)
    monkeypatch.chdir(tmp_path)
    fast = ["--trainer.fast_dev_run=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    fast += ["--model.eval.steps=2", "--model.network.filters=2", "--data.num_workers=0", "--data.val_tasks=2"]
    cli = main(["fit", "--config", "taskset/omniglot_5way_1shot_reptile", f"--data.root={root}", *fast])
    assert cli.trainer.global_step == 2
    assert cli.trainer.callback_metrics["val/accuracy"].isfinite()
    assert cli.datamodule.examples("train") == (10, 0)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["data"]
