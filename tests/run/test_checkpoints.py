"""A checkpoint is whole, or it is named and not used."""

from __future__ import annotations

import os
import random
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fomal.cli import main
from fomal.cli.errors import UsageError
from fomal.learner.build import read_checkpoint
from fomal.run.checkpoints import find, newest, publish, verify
from fomal.run.provenance import commits, versions
from tests.helpers.processes import Group
from tests.helpers.resume import STEPS, Run


def write(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"value": value, "weights": torch.arange(5000.0)}, path)
    return path


def value(path: Path) -> Any:
    return torch.load(path, weights_only=True)["value"]


def test_a_whole_file_is_whole(tmp_path: Path) -> None:
    verify(write(tmp_path / "last.ckpt"))
    assert newest(tmp_path) == (tmp_path / "last.ckpt", [])
    assert newest(tmp_path / "nothing") == (None, [])


def test_a_folder_means_its_newest_checkpoint(tmp_path: Path) -> None:
    for version in (2, 9, 10):
        (tmp_path / f"runs/version_{version}/checkpoints").mkdir(parents=True)
    older = write(tmp_path / "runs/version_2/checkpoints/last.ckpt")
    last = write(tmp_path / "runs/version_9/checkpoints/last.ckpt")
    for path in (last, last.parent, last.parents[1], last.parents[2]):  # version_10 has none
        assert find(path) == (last, [])
    assert find(older.parents[1]) == (older, [])
    last.write_bytes(b"")
    with pytest.raises(ValueError, match="cut short"):  # rather than an older run
        find(tmp_path / "runs")
    previous = write(last.with_name("previous.ckpt"))
    found, problems = find(tmp_path / "runs")
    assert found == previous
    assert len(problems) == 1


def test_a_folder_without_a_checkpoint_is_said_to_have_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no checkpoint; it has nothing"):
        find(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match=f"has no checkpoint; it has {tmp_path / 'images'}"):
        find(tmp_path)
    only = write(tmp_path / "deep/er/version_0/checkpoints/step=7.ckpt")
    with pytest.raises(FileNotFoundError, match=f"there are some in {only.parent}: give one"):
        find(tmp_path)
    assert find(only.parent)[0] == only
    write(only.with_name("step=8.ckpt"))
    with pytest.raises(ValueError, match="several checkpoints, step=7.ckpt, step=8.ckpt"):
        find(only.parent)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt")
    os.truncate(path, 10**11)  # a file with a hole, of no bytes on disk
    said = f"{path} is not read: it has 100000000000 bytes, more than the 68719476736 allowed"
    with pytest.raises(OSError, match=said):
        read_checkpoint(path)
    assert newest(tmp_path) == (None, [said])


@pytest.mark.parametrize("length", [0, 1, 100, 0.5, 0.99, -1])
def test_a_file_that_is_cut_short_is_not(length: float, tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * length) if isinstance(length, float) else length])
    with pytest.raises(ValueError, match="last.ckpt cannot be read as a checkpoint: it is cut short or damaged"):
        verify(path)


def test_a_changed_byte_is_noticed_wherever_torch_would_read_something_else(tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt")
    content = path.read_bytes()
    expected = torch.load(path, weights_only=True)
    chance, noticed = random.Random(0), 0
    for place in chance.sample(range(len(content)), 300):
        changed = bytearray(content)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        try:
            verify(path)
        except ValueError:
            noticed += 1
        else:  # padding, a time stamp, and the like
            found = torch.load(path, weights_only=True)
            assert found["value"] == expected["value"]
            assert torch.equal(found["weights"], expected["weights"])
    assert noticed > 200


def test_the_previous_one_stays_and_is_used_when_the_last_is_damaged(tmp_path: Path) -> None:
    last, unfinished = tmp_path / "last.ckpt", tmp_path / "unfinished.ckpt"
    for number in range(3):
        publish(write(unfinished, number), last)
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "previous.ckpt"]
    assert (value(last), value(tmp_path / "previous.ckpt")) == (2, 1)
    unfinished.write_bytes(last.read_bytes()[:-10])
    with pytest.raises(ValueError, match="unfinished.ckpt cannot be read"):
        publish(unfinished, last)
    assert (value(last), value(tmp_path / "previous.ckpt")) == (2, 1)
    last.write_bytes(last.read_bytes()[:-10])
    found, problems = newest(tmp_path)
    assert found == tmp_path / "previous.ckpt"
    assert [problem.partition(" ")[0] for problem in problems] == [str(last)]
    last.unlink()  # killed between the two renames
    assert newest(tmp_path) == (tmp_path / "previous.ckpt", [])


# -- through the command line


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with two checkpoints, stopped before its end."""
    run = Run(tmp_path_factory.mktemp("stopped") / "run", (1, 0))
    group = run.start()
    run.wait_for(group, 23)
    group.send(signal.SIGTERM)
    assert group.wait(30) == [143], group.said()
    return run


@pytest.fixture
def damaged(stopped: Run) -> Any:
    """The same with a damaged last checkpoint."""
    kept = {path: path.read_bytes() for path in stopped.last.parent.iterdir()}
    stopped.last.write_bytes(kept[stopped.last][:-100])
    yield stopped
    for path in stopped.last.parent.iterdir():
        path.unlink()
    for path, content in kept.items():
        path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(damaged: Run, capfd: pytest.CaptureFixture[str]) -> None:
    cli = main(["fit", "--config", str(damaged.config), "--ckpt_path", "last"])
    assert cli.trainer.global_step == STEPS
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fomal: ")]
    last, previous = damaged.last, damaged.last.with_name("previous.ckpt")
    assert lines[0].startswith(f"fomal: {last} cannot be read as a checkpoint: it is cut short or damaged (")
    assert lines[0].endswith("): using the one before.")
    assert lines[1] == f"fomal: going on from {previous}."
    verify(last)
    verify(previous)


def test_one_that_is_asked_for_by_name_is_refused_with_the_one_before(damaged: Run, fails: Any) -> None:
    said = fails("test", "--ckpt_path", str(damaged.last))
    assert "last.ckpt cannot be read as a checkpoint: it is cut short or damaged (" in said
    assert said.endswith(f"; the one before is {damaged.last.with_name('previous.ckpt')}")


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(damaged: Run, fails: Any) -> None:
    damaged.last.with_name("previous.ckpt").write_bytes(b"nothing")
    said = fails("fit", "--config", str(damaged.config), "--ckpt_path=last")
    assert said == "--ckpt_path last: no checkpoint of this run can be used; leave it out to begin anew."


def test_other_verbs_find_the_last_one_too(stopped: Run, fails: Any) -> None:
    settings = ("--data.test_tasks=3", "--trainer.enable_progress_bar=false")
    cli = main(["test", "--config", str(stopped.config), "--ckpt_path=last", *settings])
    assert cli.trainer.ckpt_path == str(stopped.last)
    nowhere = f"--trainer.logger.save_dir={stopped.folder}/elsewhere"
    said = fails("test", "--config", str(stopped.config), "--ckpt_path=last", nowhere)
    assert said == "--ckpt_path last: no checkpoint of this run can be used; leave it out to begin anew."


def test_a_run_goes_on_in_its_folder_unless_told_another(stopped: Run, tmp_path: Path) -> None:
    place = stopped.place
    again = ("fit", "--ckpt_path", str(stopped.last), "--trust=tests", "--trainer.limit_train_batches=0")
    assert Path(main(again).trainer.log_dir) == place
    assert Path(main([*again, "--trainer.logger.version=7"]).trainer.log_dir) == place.with_name("version_7")


def test_checkpoints_say_what_made_them(stopped: Run) -> None:
    made = torch.load(stopped.last, weights_only=True)["fomal"]
    assert made["versions"] == versions()
    assert made["commits"] == commits()
    assert made["config"]["seed_everything"] == 3


# -- a disk that is full


def fit_on_a_small_disk(config: Path, size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then it is an error, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    main(["fit", "--config", str(config), "--ckpt_path=last"])


def test_a_full_disk_ends_the_run_with_the_old_checkpoint_intact(stopped: Run, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in stopped.last.parent.iterdir()}
    group = Group(1, fit_on_a_small_disk, stopped.config, len(before["last.ckpt"]) // 2, out=tmp_path)
    assert group.wait(60) == [1]
    errors = [line for line in group.said().splitlines() if line.startswith("fomal: error: ")]
    assert len(errors) == 1, group.said()
    start = (
        f"fomal: error: the checkpoint of meta-iteration 25 could not be written to {stopped.last.parent}: [Errno 27]"
    )
    assert errors[0].startswith(start)
    assert ". Of earlier ones that of meta-iteration 2" in errors[0]
    assert errors[0].endswith("is intact. Make room and go on with --ckpt_path last.")
    assert {path.name: path.read_bytes() for path in stopped.last.parent.iterdir()} == before


def test_a_mistake_in_a_command_line_is_an_error_of_use(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--ckpt_path", "last", "--model.inner_stepps=3"])
    assert isinstance(stop.value.__cause__, UsageError)
