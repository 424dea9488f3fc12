import numpy as np
import pytest
import torch

from fomal.inner import SGD
from fomal.outer import QueryFOMAML, Reptile
from fomal.tasks.episode import NO_TARGET, Episode
from tests.helpers.learners import blob_learner, trainer


def episode(**changes):
    fields = {
        "support_x": torch.zeros(2, 6, 1, 4, 4),
        "support_y": torch.zeros(2, 6, dtype=torch.int64),
        "query_x": torch.zeros(2, 3, 1, 4, 4),
        "query_y": torch.zeros(2, 3, dtype=torch.int64),
        "number": torch.arange(7, 9),
        "ways": 3,
        "split": 2,
    }
    return Episode(**{**fields, **changes})


def labels(value, count=6):
    y = torch.zeros(2, count, dtype=torch.int64)
    y[1, 2] = value
    return y


REAL = {"support_y": torch.zeros(2, 6, 1), "query_y": torch.zeros(2, 3, 1), "ways": 1}


def test_a_sound_episode_passes_and_tells_its_kind():
    assert episode().check().tasks == 2
    assert not episode().is_regression
    assert episode(**REAL).check().is_regression
    many = torch.stack([labels(2), labels(NO_TARGET)], -1)  # (2, 6, 2)
    assert episode(support_y=many, query_y=many[:, :3]).check().blocks == 1
    assert episode(support_y=labels(NO_TARGET)).check().blocks == 3
    assert episode(support_y=labels(2), query_x=torch.zeros(2, 0, 1, 4, 4), query_y=torch.zeros(2, 0).long()).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_y": torch.zeros(3, 3, dtype=torch.int64)}, r"query_y has shape \(3, 3\), but support_x has 2 tasks"),
        ({"support_y": torch.zeros(2, 5, dtype=torch.int64)}, r"support_x has shape .* and support_y \(2, 5\)"),
        ({"support_x": torch.zeros(()), "ways": 3}, r"support_x has shape \(\), but support_x has 0 tasks"),
        ({"query_x": torch.zeros(2, 3, 1, 5, 4)}, r"query_x has input shape \(1, 5, 4\)"),
        ({"query_x": torch.zeros(2, 3, 1, 4, 4).int()}, r"query_x has input shape .* and torch.int32, support_x has"),
        (
            {"query_y": torch.zeros(2, 3)},
            "query_y is torch.float32, support_y is torch.int64: use int64 labels in both",
        ),
        (
            {k: torch.zeros(2, n).int() for k, n in (("support_y", 6), ("query_y", 3))},
            "support_y is torch.int32: give int64 labels, by y.l",
        ),
        ({k: torch.zeros(2, n).bool() for k, n in (("support_y", 6), ("query_y", 3))}, "support_y is torch.bool: give"),
        (
            {k: torch.zeros(2, n) for k, n in (("support_y", 6), ("query_y", 3))},
            "support_y is torch.float32, as for a regression, but ways=3",
        ),
        (
            {"support_y": torch.zeros(2, 6, 3).long(), "query_y": torch.zeros(2, 3, 2).long()},
            r"query_y has shape \(2,\) per example, support_y has \(3,\): support and query need the same target",
        ),
        (
            {"support_y": labels(3)},
            "support_y has the label 3 in test episode 8, but ways=3: labels are 0 to 2; of those",
        ),
        ({"query_y": labels(-1, 3)}, "query_y has the label -1 in test episode 8, but ways=3"),
        (
            {"support_y": torch.stack([labels(NO_TARGET), labels(5)], -1), "query_y": torch.zeros(2, 3, 2).long()},
            "support_y has the label 5 in test episode 8, but ways=3",
        ),
        (
            {"support_y": torch.stack([labels(NO_TARGET), labels(-3)], -1), "query_y": torch.zeros(2, 3, 2).long()},
            "support_y has the label -3 in test episode 8",
        ),
        ({"query_y": labels(-100, 3)}, "query_y has the label -100 in test episode 8"),
        ({"ways": 1}, "ways=1 with the labels of a classification: give the number of classes, at least 2"),
        (
            {"ways": torch.tensor([3])},
            "ways is a Tensor: give an integer; a DataLoader of episodes needs batch_size=None",
        ),
        ({"split": 5}, "Episode.split=5 must be 0"),
        ({"support_x": [torch.zeros(6, 1, 4, 4)] * 2}, "support_x is a list: give a tensor, by torch.as_tensor or"),
        ({"query_x": (torch.zeros(3, 1, 4, 4),) * 2}, "query_x is a tuple: give a tensor"),
        ({"support_y": np.zeros((2, 6), np.int64)}, "support_y is a ndarray: give a tensor, by torch.as_tensor"),
        ({"number": torch.arange(2).float()}, r"number has shape \(2,\) and torch.float32: give \(tasks,\) int64"),
        ({"support_x": torch.zeros(2, 0, 4), "support_y": labels(0)[:, :0]}, "support_x has no examples: a task needs"),
        (
            {"support_x": torch.zeros(0, 6), "support_y": labels(0)[:0], "query_x": torch.zeros(0, 3)}
            | {"query_y": labels(0, 3)[:0], "number": torch.arange(0)},
            "support_x has no tasks: give one at least",
        ),
        ({**REAL, "query_y": torch.zeros(2, 3, 2)}, r"query_y has shape \(2,\) per example, support_y has \(1,\)"),
    ],
)
def test_a_mismatch_names_field_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=rf"^Episode\.{message}" if message[0].islower() else message) as error:
        episode(**changes).check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("field", ["support_x", "query_x", "support_y", "query_y"])
def test_a_value_that_is_not_finite_is_named_with_its_episode(field, value):
    whole = episode(**{k: v.clone() if k != "ways" else v for k, v in REAL.items()})
    whole.check().refuse_nonfinite()
    getattr(whole, field)[1].flatten()[0] = value
    with pytest.raises(
        ValueError, match=f"^the {field} of test episode 8 is not finite: mend the data, or leave it out"
    ):
        whole.refuse_nonfinite()


def test_numbers_whose_sum_is_too_large_are_finite():
    large = torch.full((2, 6, 1, 4, 4), torch.finfo(torch.float32).max)
    episode(support_x=large).refuse_nonfinite()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_floating_leaves_labels_and_integer_inputs_alone(dtype):
    whole = episode(support_x=torch.ones(2, 6, 4, dtype=dtype), query_x=torch.ones(2, 3, 4, dtype=dtype))
    found = whole.floating(torch.bfloat16)
    assert (found.support_x.dtype, found.query_x.dtype, found.support_y.dtype) == (dtype, dtype, torch.int64)
    found = episode(**REAL).floating(torch.float64)
    assert {t.dtype for t in (found.support_x, found.query_x, found.support_y, found.query_y)} == {torch.float64}
    assert found.to("cpu").ways == 1


def batches(kind):
    """A sound meta-batch, and a second one with a mistake."""
    x, y = torch.rand(2, 6, 1, 9, 9), torch.arange(3).repeat(2, 2)
    sound = Episode(x, y, x, y, torch.arange(2), 3)
    second = {
        "label": sound._replace(support_y=y + 1, number=torch.arange(5, 7)),
        "ignored": sound._replace(query_y=torch.where(y == 2, -100, y)),
        "pair": (x, y),
        "list": [x, y],
        "tensor": x,
        "no queries": sound._replace(query_x=x[:, :0], query_y=y[:, :0]),
    }
    return [sound, second[kind]]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("label", "^Episode.support_y has the label 3 in training episode 5, but ways=3: labels are 0 to 2"),
        ("ignored", "^Episode.query_y has the label -100 in training episode 0"),
        ("pair", "^the loader gives a (tuple|list) where a meta-batch is wanted: let it yield"),
        ("list", "^the loader gives a list where a meta-batch is wanted"),
        ("tensor", "^the loader gives a Tensor where a meta-batch is wanted"),
        ("no queries", "^QueryFOMAML needs a query set, but Episode.query_x has no examples"),
    ],
)
def test_a_mistake_in_any_batch_of_a_users_loader_is_named(kind, message):
    learner = blob_learner(QueryFOMAML(), SGD(0.1), train={"steps": 1})
    with pytest.raises(ValueError, match=message):
        trainer(2).fit(learner, torch.utils.data.DataLoader(batches(kind), batch_size=None))
    assert learner.global_step == 1


def test_a_mistake_in_an_evaluation_is_named():
    learner = blob_learner(Reptile(), SGD(0.1), eval={"steps": 1})
    sound, wrong = batches("label")
    assert learner.evaluate(sound).logits.shape == (2, 6, 3)
    with pytest.raises(ValueError, match="^Episode.support_y has the label 3 in training episode 5"):
        learner.evaluate(wrong)
    with pytest.raises(ValueError, match=r"^Episode.query_x has no examples: an evaluation needs one"):
        learner.evaluate(batches("no queries")[1])
