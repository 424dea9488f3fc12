import pickle
from itertools import islice

import lightning as L
import pytest
import torch

from fomal.data.sinusoid import SinusoidDataModule
from fomal.tasks.datamodule import EpisodeStream
from fomal.tasks.episode import Numbers
from tests.helpers.learners import sine_learner, trainer


def numbers(loader, batches):
    return [episode.number.tolist() for episode in islice(iter(loader), batches)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_the_same_on_any_number_of_workers(workers):
    loader = SinusoidDataModule(meta_batch_size=3, num_workers=workers).train_dataloader()
    assert numbers(loader, 5) == [[3 * m, 3 * m + 1, 3 * m + 2] for m in range(5)]


def test_worker_processes_draw_the_same_tasks():
    one, two = (next(islice(iter(SinusoidDataModule(num_workers=w).train_dataloader()), 3, None)) for w in (0, 2))
    assert torch.equal(one.support_y, two.support_y)


def test_ranks_share_each_meta_batch(monkeypatch):
    data = SinusoidDataModule(meta_batch_size=6)
    seen = []
    for rank in range(3):
        monkeypatch.setattr(data, "rank_and_world", lambda rank=rank: (rank, 3))
        seen.append(numbers(EpisodeStream(data, "train", 6, start=2), 2))
    for m in range(2):
        assert sorted(n for rank in seen for n in rank[m]) == list(range(6 * (m + 2), 6 * (m + 3)))


def test_a_meta_batch_that_does_not_divide_is_refused(monkeypatch):
    data = SinusoidDataModule(meta_batch_size=5)
    monkeypatch.setattr(data, "rank_and_world", lambda: (0, 2))
    with pytest.raises(ValueError, match="meta_batch_size=5 does not divide over 2 processes"):
        data.train_dataloader()


def test_evaluation_covers_each_task_once():
    data = SinusoidDataModule(test_tasks=7, val_tasks=5, eval_tasks_per_batch=3)
    assert numbers(data.test_dataloader(), 99) == [[0, 1, 2], [3, 4, 5], [6]]
    assert numbers(data.val_dataloader(), 99) == [[0, 1, 2], [3, 4]]


def test_on_device_the_stream_has_numbers_of_which_the_same_tasks_are_drawn():
    data, plain = (SinusoidDataModule(seed=3, train_query_shots=2, on_device=on) for on in (True, False))
    for batch, expected in islice(zip(data.train_dataloader(), plain.train_dataloader(), strict=False), 3):
        assert isinstance(batch, Numbers)
        drawn = data.on_after_batch_transfer(batch, 0)
        for found, value in zip(drawn, plain.on_after_batch_transfer(expected, 0), strict=True):
            assert torch.equal(found, value) if isinstance(found, torch.Tensor) else found == value
        data.keeps_numbers = True
        assert data.on_after_batch_transfer(batch, 0) is batch
        data.keeps_numbers = False
    assert numbers(data.val_dataloader(), 1) == numbers(plain.val_dataloader(), 1)
    assert not isinstance(next(iter(data.val_dataloader())), Numbers)


def test_on_device_is_refused_where_tasks_are_drawn_elsewhere():
    class Own(SinusoidDataModule):
        samples_anywhere = False

    with pytest.raises(ValueError, match="num_workers=2 would have nothing to do, since on_device=True"):
        SinusoidDataModule(on_device=True, num_workers=2)
    with pytest.raises(ValueError, match="on_device=True: Own samples its tasks on the CPU: leave it out"):
        Own(on_device=True)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize(("tasks", "at_once"), [(1, 1), (2, 3), (7, 2), (9, 3), (10, 4), (12, 12), (30, 1)])
def test_evaluations_know_their_length_in_each_process(monkeypatch, tasks, at_once, world):
    data = SinusoidDataModule(val_tasks=tasks, eval_tasks_per_batch=at_once)
    seen = []
    for rank in range(world):
        monkeypatch.setattr(data, "rank_and_world", lambda rank=rank: (rank, world))
        found = numbers(loader := data.val_dataloader(), 99)
        assert len(loader) == max(1, len(found))  # Lightning refuses loaders without any
        seen += [number for batch in found for number in batch]
    assert sorted(seen) == list(range(tasks))


def test_training_has_no_length():
    with pytest.raises(TypeError, match="endless"):
        len(SinusoidDataModule().train_dataloader())


def test_worker_processes_may_be_spawned(monkeypatch):
    """As on macOS, and by default from Python 3.14 on: the stream reaches them without the trainer."""
    data = SinusoidDataModule(meta_batch_size=2, num_workers=1)
    data.trainer = L.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    monkeypatch.setattr(data.trainer, "cannot be pickled", lambda: None, raising=False)
    stream = pickle.loads(pickle.dumps(EpisodeStream(data, "train", 2, start=3)))
    assert stream.data.trainer is None
    assert numbers(stream, 2) == [[6, 7], [8, 9]]
    assert data.trainer is not None


def test_tasks_that_do_not_fit_the_memory_are_refused_before_they_are_drawn(monkeypatch):
    class Images(SinusoidDataModule):
        """Of two classes and 10 values each."""

        def network_sizes(self):
            return {"ways": 2, "in_features": 10}

        def episodes(self, split, number):
            raise AssertionError("tasks were drawn")

    # Two classes of 3 + 2 training and 1 + 4 evaluation examples, with 10 values of 4 bytes each.
    sizes = {"train_shots": 3, "train_query_shots": 2, "shots": 1, "query_shots": 4}
    data = Images(**sizes, meta_batch_size=6, eval_tasks_per_batch=7)
    monkeypatch.setattr("fomal.utils.checks.machine_bytes", lambda: 2800)
    data.check_memory(["train", "val", "test"])
    monkeypatch.setattr("fomal.utils.checks.machine_bytes", lambda: 2799)
    data.check_memory(["train"])
    said = "data.ways=2, data.shots=1, data.query_shots=4, data.eval_tasks_per_batch=7: a batch of the val split would"
    with pytest.raises(ValueError, match=f"^{said} take 2.8e-06 GB, and this machine has 2.8e-06: use less"):
        data.check_memory(["train", "val"])
    monkeypatch.setattr("fomal.utils.checks.machine_bytes", lambda: 2399)
    said = "data.ways=2, data.train_shots=3, data.train_query_shots=2, data.meta_batch_size=6: a batch of the train"
    with pytest.raises(ValueError, match=said):
        data.check_memory(["train"])
    with pytest.raises(ValueError, match=said):  # where a run begins
        trainer().fit(sine_learner(), datamodule=data)


def test_data_of_unknown_sizes_count_one_value_for_each_example(monkeypatch):
    monkeypatch.setattr("fomal.utils.checks.machine_bytes", lambda: 1e12)
    SinusoidDataModule(meta_batch_size=10**6).check_memory(["train", "val"])
    with pytest.raises(ValueError, match="data.meta_batch_size=2000000000: a batch of the train split would take"):
        SinusoidDataModule(train_shots=1000, meta_batch_size=2 * 10**9).check_memory(["train"])
