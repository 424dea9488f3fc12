"""The benchmark: every pair computes the same, what is absent is said, and the figures are what they are called."""

from __future__ import annotations

import importlib
import importlib.util
import json
import time
from dataclasses import replace

import pytest
import torch

from fomal.engine import cuda_graph as captured
from fomal.models import MLP, Conv4
from tests.benchmarks import __main__ as command
from tests.benchmarks import machine, measure, memory, ours, precision
from tests.benchmarks.peers import PEERS
from tests.benchmarks.peers.jax import Layout
from tests.benchmarks.works import KINDS, RUN_AS, WORKS, RandomImages
from tests.helpers.trace import tape


def small(channels: int, size: int, downsample: str):
    return replace(
        WORKS["omniglot_5way"],
        make_network=lambda: Conv4(3, channels, size, filters=4, downsample=downsample),
        make_data=lambda: RandomImages(
            channels, size, 6, ways=3, train_shots=2, train_query_shots=2, meta_batch_size=2, eval_tasks_per_batch=2
        ),
        inner_steps=3,
        inner_batch_size=4,
        eval_inner_steps=2,
        eval_inner_batch_size=3,
        fit_iterations=2,
        dtype=torch.float64,
    )


SMALL = {
    "stride": small(1, 10, "stride"),  # sizes 10, 5, 3, 2: both of the paddings
    "pool": small(3, 9, "pool"),
    "sine": replace(WORKS["sine"], make_network=lambda: MLP(hidden=[8]), fit_iterations=2, dtype=torch.float64),
}


def installed(peer: str) -> bool:
    package = PEERS[peer].package
    return package is None or importlib.util.find_spec(package) is not None


def marked(work: str, kind: str, peer: str):
    """The pair; what takes JAX long to compile is slow."""
    marks = [pytest.mark.slow] if peer == "jax_map" or peer == "jax" and work != "sine" else []
    return pytest.param(work, kind, peer, marks=marks)


PAIRS = [
    marked(work, kind, peer)
    for peer in PEERS
    for work in SMALL
    for kind in PEERS[peer].optimizers
    if SMALL[work].without(kind) is None
]


@pytest.mark.parametrize(("work", "kind", "peer"), PAIRS)
def test_pairs_compute_the_same(work: str, kind: str, peer: str) -> None:
    if not installed(peer):
        pytest.skip(f"needs {PEERS[peer].package}, which is not installed: use `uv sync --group benchmarks`")
    mine, theirs = (side() for side in measure.sides(SMALL[work], kind, PEERS[peer]))
    assert all(mine[name].shape == theirs[name].shape and mine[name].any() for name in theirs)
    adam_of_torchopt = peer == "torchopt" and PEERS[peer].optimizers[kind] == "adam"  # in float32
    assert measure.difference(mine, theirs) < (1e-5 if adam_of_torchopt else 1e-9)


@pytest.mark.skipif(not installed("jax"), reason="needs JAX: use `uv sync --group benchmarks`")
@pytest.mark.parametrize("work", SMALL)
def test_the_networks_in_jax_are_those_of_torch(work: str) -> None:
    jax = importlib.import_module("jax")
    network, x = SMALL[work].network(), SMALL[work].episode("reptile").support_x[0]
    with jax.enable_x64(True):
        torchs = {name: jax.numpy.asarray(p.detach().numpy()) for name, p in network.named_parameters()}
        layout = Layout(network)
        weights = layout.there(torchs)
        assert all((back == torchs[name]).all() for name, back in layout.back(weights).items())
        inputs = jax.numpy.asarray((x.movedim(1, -1) if x.ndim == 4 else x).numpy())
        found = torch.from_dlpack(layout.forward(jax, weights, inputs))
    torch.testing.assert_close(found, network(x).detach(), rtol=1e-10, atol=1e-12)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command on the small works, without confining the tests' process to a core."""
    monkeypatch.setattr(command, "WORKS", {name: replace(work, name=name) for name, work in SMALL.items()})
    monkeypatch.setattr(command, "pin", lambda threads: None)
    monkeypatch.setattr(command, "quiet", lambda: None)
    monkeypatch.setattr(command, "measure", lambda device: machine.measure(device, seconds=0.01))

    def main(*args: str):
        command.main([*args, "--rounds", "2", "--json", str(tmp_path / "figures.json")])
        return json.loads((tmp_path / "figures.json").read_text())

    return main


def test_the_figures(run, capsys) -> None:
    found = run("--works", "stride", "sine", "--rules", "reptile", "evaluation", "--peers", "loop")
    timed = {(row["work"], row["rule"]): row for row in found["rows"] if row["status"] == "timed"}
    assert set(timed) == {("stride", "reptile"), ("stride", "evaluation"), ("sine", "reptile")}
    row = timed["stride", "reptile"]
    for figure in ("fomal_seconds", "peer_seconds", "peer_over_fomal"):
        assert 0 < row[figure]["low"] <= row[figure]["median"] <= row[figure]["high"]
    assert row["difference"]["float64"] < 1e-9
    assert row["difference"]["float32"] < 1e-4
    rate = row["operations"] / row["fomal_seconds"]["median"]
    assert row["fomal_share_of_peak"] == pytest.approx(rate / found["machine"]["matrix_product_flops"])
    assert found["machine"]["copy_bytes_per_second"] > 1e8
    assert timed["stride", "evaluation"]["tasks"] == 2
    said = capsys.readouterr().out
    assert "not offered: sine, evaluation, traced, loop: the two protocols" in said
    assert all(word in said for word in ("peer / fomal", "GFLOP/s", "stride"))


def test_a_whole_training(run) -> None:
    (row,) = run("--works", "sine", "--rules", "fit", "--peers", "loop")["rows"]
    assert row["status"] == "timed"
    assert row["operations"] == 2 * measure.operations(SMALL["sine"], "reptile")  # two meta-iterations
    assert row["tasks"] == 2 * 25


def test_operations_are_those_of_the_layers() -> None:
    # Matrices 1 x 8 and 8 x 1 on 10 points: forward, and backward to both and to the second one's input.
    points, tasks, steps = 10, 25, 10
    assert measure.operations(SMALL["sine"], "reptile") == tasks * steps * 2 * points * (2 * 8 + 3 * 8)


def test_absent_peers_are_listed(run, monkeypatch, capsys) -> None:
    monkeypatch.setattr(PEERS["higher"], "package", "there_is_no_such_package")
    found = run("--works", "sine", "--rules", "maml", "--peers", "loop", "higher")
    assert found["absent"] == {"higher": "not installed (No module named 'there_is_no_such_package')"}
    assert {row["peer"]: row["status"] for row in found["rows"]} == {"loop": "timed", "higher": "absent"}
    assert "absent: higher: not installed" in capsys.readouterr().out


def test_what_differs_is_not_timed(run, monkeypatch, capsys) -> None:
    right = PEERS["loop"].prepare

    def wrong(work, kind):
        return lambda: {name: 1.001 * g for name, g in right(work, kind)().items()}

    monkeypatch.setattr(PEERS["loop"], "prepare", wrong)
    (row,) = run("--works", "sine", "--rules", "maml", "--peers", "loop")["rows"]
    assert row["status"] == "differs"
    assert row["difference"]["float64"] == pytest.approx(1e-3, rel=0.01)
    assert "peer_over_fomal" not in row
    assert "differs: sine, maml, traced, loop" in capsys.readouterr().out


def test_a_peer_that_fails_is_named(run, monkeypatch) -> None:
    def fails(work, kind):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(PEERS["loop"], "prepare", fails)
    (row,) = run("--works", "sine", "--rules", "maml", "--peers", "loop")["rows"]
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: out of memory")


def test_rounds_alternate(monkeypatch) -> None:
    order = []
    pair = (lambda: (order.append("ours"), time.sleep(0.002)), lambda: (order.append("theirs"), time.sleep(0.02)))
    mine, theirs = measure.alternate(pair, 3, "cpu")
    assert len(mine) == len(theirs) == 3
    assert max(mine) < min(theirs)
    assert order == ["ours", "theirs", "theirs", "ours"] * 2 + ["ours", "theirs"]


def test_the_loop_does_everything() -> None:
    assert set(PEERS["loop"].optimizers) == set(KINDS)


def test_ways_to_run(run, monkeypatch, capsys) -> None:
    monkeypatch.setitem(captured.CAPTURES, "cpu", tape)
    rows = run("--works", "sine", "--rules", "reptile", "--peers", "loop", "--as", "plain", "captured")["rows"]
    assert [(row["as"], row["status"]) for row in rows] == [("plain", "timed"), ("captured", "timed")]
    assert all(row["difference"]["float64"] < 1e-9 for row in rows)
    assert "captured" in capsys.readouterr().out


def test_a_captured_training_is_that_of_the_loop(monkeypatch) -> None:
    monkeypatch.setitem(captured.CAPTURES, "cpu", tape)
    pair = measure.sides(replace(SMALL["sine"], run_as="captured"), "fit", PEERS["loop"])
    assert measure.difference(*(side() for side in pair)) < 1e-9


@pytest.mark.parametrize("way", RUN_AS)
def test_ways_are_settings_of_the_learner(way: str) -> None:
    learner = replace(SMALL["sine"], run_as=way).learner("reptile", "adam")
    tracer = learner.objective.tracer
    assert (tracer.is_on, tracer.compiled, learner.execution.cuda_graph) == (
        way != "plain",
        way == "compiled",
        way == "captured",
    )


def test_captured_needs_a_gpu(run) -> None:
    with pytest.raises(SystemExit, match="no CUDA graphs on cpu"):
        run("--as", "captured")


@pytest.mark.traced
def test_a_way_that_fomal_leaves_is_not_timed(run, monkeypatch) -> None:
    class Own(MLP):
        """Not known to be the same each time."""

    monkeypatch.setitem(command.WORKS, "own", replace(SMALL["sine"], name="own", make_network=Own))
    plain, traced = run("--works", "own", "--rules", "reptile", "--peers", "loop", "--as", "plain", "traced")["rows"]
    assert plain["status"] == "timed"
    assert traced["status"] == "failed"
    assert "fomal does not run traced: Own is not known to compute the same" in traced["reason"]


@pytest.mark.parametrize("way", ["traced", "captured"])
def test_the_trainers_share(way: str, run, monkeypatch, capsys) -> None:
    monkeypatch.setitem(captured.CAPTURES, "cpu", tape)
    found = run("--works", "sine", "--rules", "trainer", "--as", way)["trainer"]
    (row,) = found
    assert row["status"] == "timed"
    assert row["difference"]["float64"] < 1e-12
    assert row["share"]["low"] >= row["fit_seconds"]["low"] / row["bare_seconds"]["high"] - 1
    assert row["share"]["high"] <= row["fit_seconds"]["high"] / row["bare_seconds"]["low"] - 1
    assert "Trainer's share" in capsys.readouterr().out


def test_time_within_a_training(monkeypatch) -> None:
    now = iter([100.0, 160.0])
    monkeypatch.setattr(ours.time, "perf_counter", lambda: next(now))
    stamps = ours.Stamps(replace(SMALL["sine"], fit_iterations=23))
    for done in range(1, 28):
        stamps.note(done)
    assert (stamps.begin, stamps.end) == (4, 27)
    assert stamps.seconds() == pytest.approx(60 / 23)


def test_replicas(run, monkeypatch, capsys) -> None:
    monkeypatch.setitem(captured.CAPTURES, "cpu", tape)
    found = run("--works", "sine", "--rules", "replicas", "--replicas", "2", "--as", "traced", "captured")
    row, graphs = found["replicas"]
    assert row["status"] == "timed"
    assert row["difference"]["float64"] < 1e-9
    assert row["joint_over_one"]["low"] * row["all_over_joint"]["high"] == pytest.approx(2)
    assert (graphs["status"], graphs["reason"]) == ("not offered", "cuda_graph does not capture replicas")
    assert "one by one / joint" in capsys.readouterr().out


def test_sixteen_bits(run, monkeypatch, capsys) -> None:
    args = ("--works", "sine", "--rules", "reptile", "fit", "--precision", "bf16")
    found = run(*args)
    assert found["rows"] == []
    assert [row["status"] for row in found["precision"]] == ["timed", "timed"]
    assert all(1e-4 < row["difference"]["bfloat16"] < 0.5 for row in found["precision"])  # autocast was on
    assert "32-bit / bf16" in capsys.readouterr().out
    monkeypatch.setattr(precision, "TOLERANCE", 1e-5)
    assert {row["status"] for row in run(*args)["precision"]} == {"differs"}


def test_memory(run, capsys) -> None:
    rows = run("--works", "sine", "--rules", "memory", "--as", "traced", "compiled")["memory"]
    timed = {row["outer_rule"]: row["peak_bytes"] for row in rows if row["status"] == "timed"}
    assert set(timed) == {"reptile", "fomaml", "query_fomaml"}
    losses = 2 * 45 * 25 * 4  # of 45 steps more and 25 tasks, one by one and joined: all that is kept of a step
    assert all(0 < peaks["5"] <= peaks["50"] <= peaks["5"] + losses for peaks in timed.values())
    assert [row["as"] for row in rows if row["status"] == "not offered"] == ["compiled"] * 3
    few, many = (memory.peak(replace(SMALL["stride"], inner_steps=steps), "maml", "sgd") for steps in (2, 8))
    assert many > 2 * few  # which keeps every step
    assert "50 steps MiB" in capsys.readouterr().out
