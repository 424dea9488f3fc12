import pytest
import torch

from fomal.evaluation.metrics import TaskMean


@pytest.mark.parametrize("size", [None, 3])
def test_mean_and_interval_are_those_of_all_tasks_however_they_are_batched(size):
    values = torch.rand(17) if size is None else torch.rand(17, size)
    metric = TaskMean(size)
    for part in values.split([1, 5, 11]):
        metric.update(part)
    mean, half = metric.compute()
    torch.testing.assert_close(mean, values.double().mean(0))
    torch.testing.assert_close(half, 1.96 * values.double().std(0) / 17**0.5)
    assert metric.total_tasks == 17


def test_one_task_has_no_interval():
    metric = TaskMean()
    metric.update(torch.tensor([0.5]))
    mean, half = metric.compute()
    assert mean == 0.5
    assert torch.isnan(half)


def test_the_interval_covers_the_truth_in_about_95_of_100_cases():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(2000):
        metric = TaskMean()
        metric.update((torch.rand(60, generator=generator) < 0.7).double())
        mean, half = metric.compute()
        covered += bool((mean - 0.7).abs() <= half)
    assert 0.92 < covered / 2000 < 0.97


def test_sums_stay_in_float64_at_any_precision_of_the_run():
    metric = TaskMean().to(torch.bfloat16).half()
    metric.update(torch.full((3,), 0.1))
    assert metric.total.dtype == torch.float64
