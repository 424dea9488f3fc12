import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fomal.distributed import average_over_processes


def _worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        trees = [
            {"a": torch.full((2, 3), float(rank)), "b": torch.tensor(rank * 10.0)},
            {"c": torch.arange(4.0) * rank},
        ]
        torch.save(average_over_processes(trees), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_every_process_gets_the_mean(tmp_path):
    mp.start_processes(_worker, (2, str(tmp_path)), nprocs=2, start_method="spawn")
    for rank in range(2):
        first, second = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(first["a"], torch.full((2, 3), 0.5))
        assert first["b"].shape == ()
        assert first["b"] == 5
        assert torch.equal(second["c"], torch.arange(4.0) / 2)


def test_one_process_is_left_alone():
    tree = {"a": torch.ones(2)}
    assert average_over_processes([tree])[0] is tree
