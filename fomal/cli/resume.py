"""Go on with a run where it was left: its last checkpoint, its folder and its log."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger

from fomal.run.checkpoints import newest, version_folders
from fomal.utils.files import keep_earlier, write_csv

LAST_KEYWORD = "last"
_FOLDERS = ("CSVLogger", "TensorBoardLogger")  # these keep the run in save_dir/name/version


def find_last(trainer: Mapping[str, Any]) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of the run that a trainer's configuration describes.

    Where the logger's `version` is not given, that is the highest version which has one.

    Returns:
        The checkpoint, if there is one, and what is wrong with those passed over.
    """
    problems: list[str] = []
    for folder in _checkpoint_folders(trainer):
        found, wrong = newest(folder)
        problems += wrong
        if found or wrong:  # a damaged run is not passed over for an older one
            return found, problems
    return None, problems


def go_on_in_its_folder(trainer: Mapping[str, Any], ckpt_path: Path) -> None:
    """Let the logger of a configuration go on in the folder of `ckpt_path`, unless it is told another."""
    logger = _first_logger(trainer)
    if logger is None or logger["init_args"].get("version") is not None:
        return
    folder = ckpt_path.resolve().parents[1]
    if folder.parent == _runs(logger).resolve() and is_of_run(ckpt_path, folder):
        logger["init_args"]["version"] = folder.name


def is_of_run(ckpt_path: Path, folder: Path) -> bool:
    """Tell whether a checkpoint is the last or the previous one of the run in `folder`."""
    return ckpt_path.resolve().parent == folder.resolve() / "checkpoints"


def go_on_with_log(logger: CSVLogger, log: Path, step: int) -> None:
    """Keep the rows of `metrics.csv` as far as meta-iteration `step`; what the run logged beyond comes again.

    The whole file is kept under a numbered name if it goes further.
    """
    with log.open(newline="") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), list(reader.fieldnames or [])
    kept = [row for row in rows if row.get("step") and float(row["step"]) <= step]
    whole = keep_earlier(log)  # which the logger would delete
    writer: Any = logger.experiment
    writer.metrics_keys = names
    if whole is not None and len(kept) == len(rows):
        whole.replace(log)
    else:
        write_csv(log, names, kept)


def _checkpoint_folders(trainer: Mapping[str, Any]) -> list[Path]:
    for callback in trainer.get("callbacks") or []:
        dirpath = callback["init_args"].get("dirpath") if "init_args" in callback else None
        if str(callback["class_path"]).endswith(".SaveLast") and dirpath:
            return [Path(dirpath)]
    logger = _first_logger(trainer)
    if logger is None:
        return [Path(trainer.get("default_root_dir") or ".") / "checkpoints"]
    runs, version = _runs(logger), logger["init_args"].get("version")
    if version is not None:
        return [runs / (version if isinstance(version, str) else f"version_{version}") / "checkpoints"]
    return [folder / "checkpoints" for folder in version_folders(runs)]


def _first_logger(trainer: Mapping[str, Any]) -> Any:
    """The logger that says where the run is, if it is of a kind known here."""
    loggers = trainer.get("logger")
    first: Any = loggers[0] if isinstance(loggers, list) and loggers else loggers
    if not hasattr(first, "get"):  # true, false or nothing
        return None
    return first if str(first.get("class_path")).split(".")[-1] in _FOLDERS else None


def _runs(logger: Mapping[str, Any]) -> Path:
    settings = logger["init_args"]
    return Path(settings["save_dir"], settings.get("name") or "")
