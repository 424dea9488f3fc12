from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fomal.utils.files import (
    UnreadableFile,
    WriteError,
    atomic_replace,
    dispensable,
    is_full,
    keep_earlier,
    read_regular,
    unwritten,
    write_csv,
    write_text,
)


def test_a_file_gets_the_first_free_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for run in range(3):
        assert path.exists() is False
        path.write_text(f"run {run}")
        assert keep_earlier(path) == tmp_path / f"metrics_{run + 1}.csv"
    assert [(tmp_path / f"metrics_{n}.csv").read_text() for n in (1, 2, 3)] == ["run 0", "run 1", "run 2"]


def test_nothing_happens_without_a_file(tmp_path: Path) -> None:
    assert keep_earlier(tmp_path / "config.yaml") is None
    assert list(tmp_path.iterdir()) == []


def test_a_gap_is_filled_and_nothing_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config_1.yaml").write_text("first")
    (tmp_path / "config_3.yaml").write_text("third")
    (tmp_path / "config.yaml").write_text("new")
    assert keep_earlier(tmp_path / "config.yaml") == tmp_path / "config_2.yaml"
    assert (tmp_path / "config_1.yaml").read_text() == "first"
    assert (tmp_path / "config_3.yaml").read_text() == "third"


# Regular files alone


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Files that are not regular, or that never end, with what is said of them."""
    paths = {kind: tmp_path / kind for kind in ("fifo", "socket", "endless", "link to a fifo")}
    os.mkfifo(paths["fifo"])
    paths["endless"].symlink_to("/dev/zero")
    paths["link to a fifo"].symlink_to("fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(paths["socket"]))
        yield paths


def test_only_regular_files_are_read(odd: dict[str, Path]) -> None:
    """Opening a fifo would wait for its writer for ever."""
    kinds = {"fifo": "a fifo", "socket": "a socket", "endless": "a device", "link to a fifo": "a fifo"}
    for kind, path in odd.items():
        with pytest.raises(UnreadableFile) as error:
            read_regular(path)
        assert str(error.value) == f"{path} is not read: it is {kinds[kind]}, and no regular file"
    with pytest.raises(IsADirectoryError):
        read_regular(odd["fifo"].parent)
    with pytest.raises(FileNotFoundError):
        read_regular(odd["fifo"].parent / "nowhere")


def test_regular_files_have_a_limit(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"12345")
    link.symlink_to(file)
    assert read_regular(link, 5) == b"12345"
    with pytest.raises(UnreadableFile, match=r"file is not read: it has 5 bytes, more than the 4 allowed$"):
        read_regular(file, 4)
    with pytest.raises(UnreadableFile, match=r"link is not read: it is a link, and no regular file$"):
        read_regular(link, follow=False)
    os.truncate(file, 2**40)  # a file with a hole, of no bytes on disk
    with pytest.raises(UnreadableFile, match=r"1099511627776 bytes"):
        read_regular(file)
    if Path("/proc/self/maps").exists():  # size 0, as files have that the kernel makes up and that may never end
        with pytest.raises(UnreadableFile, match=r"maps is not read: it says that it is empty, and is not$"):
            read_regular("/proc/self/maps")


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes, as on a disk that is full then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_there_and_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.json"
    write_text(path, "earlier")
    with pytest.raises(WriteError, match=rf"{path} could not be written \(.*\): make room on the disk"), disk_of(1000):
        write_text(path, "x" * 2000, keep=True)
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [("results.json", "earlier")]
    write_text(path, "new", keep=True)
    assert sorted(file.read_text() for file in path.parent.iterdir()) == ["earlier", "new"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    path = tmp_path / "results.json"
    with pytest.raises(WriteError, match=rf"{path} could not be written .*: make {tmp_path} writable, or choose"):
        write_text(path, "x")


def test_ctrl_c_leaves_nothing_and_devices_stay(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_replace(tmp_path / "a.csv"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(WriteError, match="pipe.csv could not be written .*in the way"):
        write_text(tmp_path / "pipe.csv", "x", keep=True)
    assert [file.name for file in tmp_path.iterdir()] == ["pipe.csv"]


def test_any_error_of_a_full_disk_has_a_remedy() -> None:
    full, missing = OSError(errno.ENOSPC, "No space left on device"), FileNotFoundError(errno.ENOENT, "No such", "a")
    assert is_full(full)
    assert unwritten(None, full).endswith(
        "(No space left on device): make room for the run, data.cache_dir and $TMPDIR."
    )
    assert unwritten("runs/x", OSError(errno.EROFS, "Read-only")) == (
        "runs/x could not be written (Read-only): make runs writable, or choose another folder."
    )
    assert not is_full(missing)
    assert not is_full(WriteError("named already"))


def test_errors_about_other_files_keep_their_own_text(tmp_path: Path) -> None:
    lacking = tmp_path / "data" / "lacking.png"
    with pytest.raises(FileNotFoundError, match="lacking.png") as caught, atomic_replace(tmp_path / "out" / "a.csv"):
        lacking.read_bytes()
    assert not isinstance(caught.value, WriteError)


def test_tables_are_safe_to_open_in_a_spreadsheet(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_csv(path, ["label", "=x", "-1"], [{"label": "=cmd()", "=x": -0.5, "-1": None}, {"label": "@a", "=x": "-3"}])
    assert path.read_text().splitlines() == ["label,'=x,-1", "'=cmd(),-0.5,", "'@a,-3,"]


def test_what_a_run_can_do_without_does_not_end_it() -> None:
    with pytest.warns(UserWarning, match=r"^The run goes on without its curve: c.png full$"), dispensable("its curve"):
        raise WriteError("c.png full")
    with pytest.warns(UserWarning, match=r"^The run .* its curve: ValueError: two lines$"), dispensable("its curve"):
        raise ValueError("two\nlines")
    with pytest.raises(KeyboardInterrupt), dispensable("its curve"):
        raise KeyboardInterrupt
