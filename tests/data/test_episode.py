import pytest
import torch

from fomal.data.episode import Episode


def episode(**changes):
    fields = {
        "support_x": torch.zeros(2, 6, 1, 4, 4),
        "support_y": torch.zeros(2, 6, dtype=torch.int64),
        "query_x": torch.zeros(2, 3, 1, 4, 4),
        "query_y": torch.zeros(2, 3, dtype=torch.int64),
        "number": torch.arange(2),
    }
    return Episode(**{**fields, **changes}, ways=3)


def test_a_sound_episode_passes_and_tells_its_kind():
    assert episode().check().tasks == 2
    assert not episode().is_regression
    assert episode(support_y=torch.zeros(2, 6, 1), query_y=torch.zeros(2, 3, 1)).check().is_regression


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_y": torch.zeros(3, 3, dtype=torch.int64)}, r"query_y has shape \(3, 3\), but support_x has 2 tasks"),
        ({"support_y": torch.zeros(2, 5, dtype=torch.int64)}, r"support_x has shape .* and support_y \(2, 5\)"),
        ({"query_x": torch.zeros(2, 3, 1, 5, 4)}, r"query_x has input shape \(1, 5, 4\)"),
        ({"query_y": torch.zeros(2, 3)}, "query_y is torch.float32, support_y is torch.int64"),
    ],
)
def test_a_mismatch_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        episode(**changes).check()


def test_floating_leaves_labels_alone():
    assert episode().floating(torch.float64).support_y.dtype == torch.int64
    assert episode().floating(torch.float64).query_x.dtype == torch.float64
    moved = episode().to("cpu")
    assert moved.ways == 3
