from statistics import NormalDist

import numpy as np
import pytest
import torch

from fomal.evaluation.means import TaskMean


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


def test_weights_are_those_of_repeated_tasks_in_the_mean_and_of_independent_ones_in_the_interval():
    values, weights = torch.rand(9, 2).double(), torch.tensor([1.0, 2, 0, 4, 1, 1, 3, 2, 1])
    values[2] = torch.nan  # of weight 0, so none
    metric = TaskMean(2, weighted=True)
    for part, own in zip(values.split(4), weights.split(4), strict=True):
        metric.update(part, own)
    mean, half = metric.compute()
    kept, w = values[weights > 0].numpy(), weights[weights > 0].double().numpy()
    np.testing.assert_allclose(mean, np.average(kept, axis=0, weights=w), rtol=1e-14)
    variance = [np.cov(column, aweights=w, ddof=1) for column in kept.T]  # of one value
    np.testing.assert_allclose(half, 1.96 * np.sqrt(np.array(variance) * (w**2).sum()) / w.sum(), rtol=1e-12)
    assert metric.total_tasks == 8


@pytest.mark.parametrize("weight", [None, 1.0, 0.3])
def test_equal_weights_are_as_none(weight):
    values = torch.rand(17).double()
    metric, plain = TaskMean(weighted=True), TaskMean()
    metric.update(values, None if weight is None else torch.full((17,), weight))
    plain.update(values)
    for a, b in zip(metric.compute(), plain.compute(), strict=True):
        assert torch.equal(a, b) if weight in (None, 1.0) else torch.isclose(a, b, rtol=1e-7, atol=0)
    single = TaskMean(weighted=True)
    single.update(values[:1], torch.tensor([0.1]))
    assert single.compute()[1].isnan()


def test_the_interval_is_the_normal_one():
    values = torch.rand(40, generator=torch.Generator().manual_seed(1)).double()
    metric = TaskMean()
    metric.update(values)
    mean, half = metric.compute()
    normal = NormalDist(values.mean().item(), np.std(values.numpy(), ddof=1) / 40**0.5)
    expected = normal.inv_cdf(0.025), normal.inv_cdf(0.975)
    np.testing.assert_allclose([mean - half, mean + half], expected, rtol=1e-4)  # 1.96 is 1.959964
