import torch

from fomal import tree


def test_arithmetic_is_elementwise_by_name():
    a, b = (
        {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor(3.0)},
        {"y": torch.tensor(1.0), "x": torch.tensor([5.0, 5.0])},
    )
    assert tree.add(a, b)["x"].tolist() == [6.0, 7.0]
    assert tree.subtract(a, b)["y"] == 2
    assert tree.add_scaled(a, b, -2.0)["x"].tolist() == [-9.0, -8.0]
    assert tree.scaled(a, 3.0)["y"] == 9


def test_stack_uses_no_memory_and_mean_undoes_it():
    a = {"x": torch.randn(4, 5)}
    stacked = tree.stack(a, 7)
    assert stacked["x"].shape == (7, 4, 5)
    assert stacked["x"].untyped_storage().nbytes() == a["x"].untyped_storage().nbytes()
    torch.testing.assert_close(tree.mean(stacked)["x"], a["x"])
