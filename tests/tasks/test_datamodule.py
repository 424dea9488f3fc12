import pickle
from itertools import islice

import lightning as L
import pytest
import torch

from fomal.data.sinusoid import SinusoidDataModule
from fomal.tasks.datamodule import EpisodeStream
from fomal.tasks.episode import Numbers


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
        draws_anywhere = False

    with pytest.raises(ValueError, match="num_workers=2 would have nothing to do, since on_device=True"):
        SinusoidDataModule(on_device=True, num_workers=2)
    with pytest.raises(ValueError, match="on_device=True: Own draws its tasks on the CPU: leave it out"):
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
