import torch

from fomal.utils import tree


def test_arithmetic_is_elementwise_by_name():
    a, b = (
        {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor(3.0)},
        {"y": torch.tensor(1.0), "x": torch.tensor([5.0, 5.0])},
    )
    assert tree.add(a, b)["x"].tolist() == [6.0, 7.0]
    assert tree.subtract(a, b)["y"] == 2
    assert tree.add_scaled(a, b, -2.0)["x"].tolist() == [-9.0, -8.0]
    assert tree.scaled(a, 3.0)["y"] == 9


def test_distance_is_euclidean_over_all_parameters_of_a_task():
    generator = torch.Generator().manual_seed(0)
    b = {name: torch.randn(shape, generator=generator).double() for name, shape in {"x": (4, 5), "y": ()}.items()}
    a = {name: torch.randn(3, *p.shape, generator=generator).double() for name, p in b.items()}
    expected = [sum(float(((a[name][t] - b[name]) ** 2).sum()) for name in a) ** 0.5 for t in range(3)]
    torch.testing.assert_close(tree.distance(a, b), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    only = tree.distance({"y": a["y"]}, b)  # names that b alone has do not count
    torch.testing.assert_close(only, (a["y"] - b["y"]).abs(), rtol=1e-12, atol=0)


def test_stack_uses_no_memory():
    a = {"x": torch.randn(4, 5)}
    stacked = tree.stack(a, 7)
    assert stacked["x"].shape == (7, 4, 5)
    assert stacked["x"].untyped_storage().nbytes() == a["x"].untyped_storage().nbytes()
    assert all(torch.equal(one, a["x"]) for one in stacked["x"])
