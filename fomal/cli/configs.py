"""The configs that come with fomal, and how `--config` names them."""

from __future__ import annotations

from pathlib import Path

from fomal.cli.errors import UsageError, did_you_mean
from fomal.utils.files import check_path

DEFAULT = "sinusoid/reptile"


def configs_dir() -> Path:
    """The folder of the shipped configs: `fomal/configs` in an installed wheel, `configs` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise UsageError(f"the shipped configs are neither in {package} nor beside it: give --config FILE.")


def config_names() -> list[str]:
    """Names of the shipped configs: their paths without folder and suffix, e.g. "sinusoid/reptile"."""
    folder = configs_dir()
    names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return [name for name in names if not name.startswith(("experiments/", "sweeps/"))]  # of several runs each


def is_text(config: str) -> bool:
    """Tell whether `config` is YAML or JSON itself rather than a path: jsonargparse takes both."""
    return "\n" in config or config.lstrip().startswith("{")


def find_config(name: str) -> str:
    """The config file for what was given as `--config`: an existing file, or a shipped config's name.

    Config text and remote addresses are returned as they are.
    """
    if is_text(name) or "://" in name:
        return name
    check_path("--config", name)
    short = name.removeprefix("configs/").removesuffix(".yaml")
    path = Path(name) if Path(name).is_file() else configs_dir() / f"{short}.yaml"
    if path.is_file() and path.resolve().is_relative_to(configs_dir() / "experiments"):
        raise UsageError(f"--config {name} describes several runs: use `fomal experiment {path.stem}`.")
    if path.is_file() and path.resolve().is_relative_to(configs_dir() / "sweeps"):
        raise UsageError(f"--config {name} describes a sweep of Weights & Biases: use `wandb sweep {path}`.")
    if Path(name).is_file():
        return name
    if short not in config_names():
        hint = did_you_mean(short, config_names()) or f"; the shipped ones are in {configs_dir()}"
        raise UsageError(f"--config {name}: there is no such file and no shipped config of that name{hint}")
    return str(configs_dir() / f"{short}.yaml")
