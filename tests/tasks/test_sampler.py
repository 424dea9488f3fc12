import pytest
import torch

from fomal.tasks.sampler import choose, minibatch_indices, separate_tail, shuffled

NUMBER = torch.arange(11)


def test_choose_is_a_function_of_seed_split_and_number_alone():
    population = torch.full((30,), 12)
    classes, members = choose(3, 0, NUMBER, population, ways=5, examples=4)
    assert classes.shape == (11, 5)
    assert members.shape == (11, 5, 4)
    for t in (0, 4, 10):  # alone, and in another company
        one = choose(3, 0, NUMBER[t : t + 1], population, 5, 4)
        assert torch.equal(one[0][0], classes[t])
        assert torch.equal(one[1][0], members[t])
    for other in ((4, 0), (3, 1)):
        assert not torch.equal(choose(*other, NUMBER, population, 5, 4)[0], classes)


def test_choose_respects_the_size_of_each_class():
    population = torch.tensor([3, 9, 20])
    classes, members = choose(0, 0, torch.arange(500), population, ways=3, examples=3)
    largest = torch.zeros(3, dtype=torch.int64).scatter_reduce(0, classes.flatten(), members.amax(-1).flatten(), "amax")
    assert largest.tolist() == [2, 8, 19]
    assert (members.sort(-1).values.diff(dim=-1) > 0).all()


@pytest.mark.parametrize(("examples", "batch", "steps"), [(10, 5, 8), (10, 4, 10), (7, 3, 14), (5, 12, 5), (50, 10, 5)])
def test_cycling_shows_every_example_once_in_each_pass(examples, batch, steps):
    indices = minibatch_indices(0, 0, NUMBER, examples, steps, batch)
    assert [tuple(step.shape) for step in indices] == [(11, batch)] * steps
    stream = torch.cat(indices, 1)  # batches run across the boundary of passes
    for start in range(0, steps * batch - examples + 1, examples):
        one_pass = stream[:, start : start + examples].sort(1).values
        assert torch.equal(one_pass, torch.arange(examples).expand(11, -1))
    passes = stream[:, : steps * batch // examples * examples].view(11, -1, examples)
    if passes.shape[1] > 1:
        assert not torch.equal(passes[:, 0], passes[:, 1])  # each pass is shuffled anew


def test_replacement_draws_each_batch_alone_and_without_repeats_inside():
    indices = torch.stack(minibatch_indices(0, 0, torch.arange(400), 10, 6, 5, replacement=True), 1)  # (T, k, B)
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
    two = indices[:, :2].flatten(1)
    assert (two.sort(-1).values.diff(dim=-1) == 0).any(), "two independent halves of ten should share examples"
    counts = indices.flatten().bincount(minlength=10).double()
    expected = indices.numel() / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # 99.9 % quantile, 9 degrees of freedom


def test_replacement_refuses_batches_larger_than_the_task():
    with pytest.raises(ValueError, match=r"batch_size=11 exceeds the 10 support examples.*replacement"):
        minibatch_indices(0, 0, NUMBER, 10, 2, 11, replacement=True)


def test_minibatch_indices_depend_on_number_seed_and_split_alone():
    indices = minibatch_indices(3, 1, NUMBER, 10, 3, 4)
    alone = minibatch_indices(3, 1, NUMBER[6:7], 10, 3, 4)
    assert all(torch.equal(a[0], p[6]) for a, p in zip(alone, indices, strict=True))
    longer = minibatch_indices(3, 1, NUMBER, 10, 9, 4)
    assert all(torch.equal(a, b) for a, b in zip(indices, longer, strict=False))
    assert not torch.equal(minibatch_indices(4, 1, NUMBER, 10, 3, 4)[0], indices[0])
    assert not torch.equal(minibatch_indices(3, 2, NUMBER, 10, 3, 4)[0], indices[0])


def test_separate_tail_reserves_the_same_number_of_each_class():
    head, tail = separate_tail(examples=12, ways=3, tail_shots=1)
    labels = torch.arange(3).repeat_interleave(4)
    assert labels[tail].tolist() == [0, 1, 2]
    assert labels[head].bincount().tolist() == [3, 3, 3]
    assert sorted([*head.tolist(), *tail.tolist()]) == list(range(12))


@pytest.mark.parametrize("tail_shots", [0, 4, 5])
def test_separate_tail_must_leave_something_to_adapt_on(tail_shots):
    with pytest.raises(ValueError, match=rf"tail_shots={tail_shots} does not split.*4 support examples per class"):
        separate_tail(12, 3, tail_shots)


def test_shuffled_is_a_permutation_of_the_seed():
    assert sorted(shuffled(0, 100).tolist()) == list(range(100))
    assert torch.equal(shuffled(0, 100), shuffled(0, 100))
    assert not torch.equal(shuffled(1, 100), shuffled(0, 100))
