"""Check the names in a configuration that somebody else may have made, before anything is imported or built.

A checkpoint and an adapted model's folder say which classes to make. Trusted without a word are fomal's own networks,
rules, losses, metrics, inner optimisers, data and callbacks, the modules of `torch.nn`, the optimisers and schedulers
of `torch.optim`, the classifiers of `torchvision.models`, the transforms of `torchvision.transforms.v2`,
`timm.create_model`, metrics of `torchmetrics.classification` and `torchmetrics.regression`, and those of Lightning's
loggers and callbacks that only write into the run's folder. All others
need the user's word, `--trust NAME` on the command line or `trust=["NAME"]` in Python. Nothing is downloaded because
such a configuration says so, and no configuration is read from a path or an address in it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

_MODULE = "torch.nn.modules.module.Module"
_BASES = {  # what may be named: classes of these kinds, defined in these packages
    "torch.nn": {_MODULE},
    "torch.optim": {"torch.optim.optimizer.Optimizer", "torch.optim.lr_scheduler.LRScheduler"},
    "torchvision.models": {_MODULE},
    "torchvision.transforms.v2": {_MODULE},
    "fomal.models": {_MODULE},
    "fomal.inner": {"fomal.inner.loss.Loss", "fomal.inner.optimizer.InnerOptimizer"},
    "fomal.outer": {"fomal.outer.rule.OuterRule"},
    "fomal.data": {"fomal.tasks.datamodule.EpisodeDataModule", _MODULE},
    "fomal.evaluation": {"fomal.evaluation.metrics.Metric"},
    "torchmetrics.classification": {"torchmetrics.metric.Metric"},
    "torchmetrics.regression": {"torchmetrics.metric.Metric"},
    "fomal.callbacks": {"lightning.pytorch.callbacks.callback.Callback"},
}
_LIGHTNING = {
    "loggers": ("CSVLogger", "TensorBoardLogger"),
    "callbacks": (
        *("DeviceStatsMonitor", "EarlyStopping", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary"),
        *("RichModelSummary", "RichProgressBar", "StochasticWeightAveraging", "TQDMProgressBar", "Timer"),
    ),
}
# Reads learn2learn's data sets, pickles that can run any code.
_NOT = {"fomal.data.taskset.TasksetDataModule"}
_TIMM = "timm.create_model"
_TIMM_READS = ("cache_dir", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_NAMES = ("class_path", "factory")
# Settings that are files, folders and labels, which may look like names of modules.
_TEXTS = {
    *("root", "labels", "cache_dir", "save_dir", "dirpath", "default_root_dir", "filename", "name", "version"),
    *("train_classes", "val_classes", "test_classes", "monitor"),
}
_MOST = 100_000  # values
_DEEPEST = 40  # nested in each other
_PLAIN = (str, bool, int, float, type(None))


class Trust:
    """The names that a user trusts beside those trusted without a word.

    Args:
        names: class paths, or packages, which stand for all that is defined within them.
        own: names that the user's own configuration or command line gives as well; each stands for itself alone.

    Raises:
        ValueError: one of `names` is no import path.
    """

    def __init__(self, names: Collection[str] | None = None, own: Collection[str] = ()) -> None:
        self.names: tuple[str, ...] = (names,) if isinstance(names, str) else tuple(names or ())
        for name in self.names:
            if not all(part.isidentifier() for part in name.split(".")):
                raise ValueError(f"trust={name!r} is no import path: write e.g. mypackage.nets.Net, or mypackage.")
        self.own = frozenset(own)

    def has(self, name: str) -> bool:
        """Tell whether the user has vouched for `name`."""
        if name in self.own or name in self.names:
            return True
        packages = [package for package in self.names if name.startswith(f"{package}.")]
        return any(_is_defined_in(name, package) for package in packages)

    def allows(self, name: str) -> bool:
        """Tell whether `name` may be imported because a file names it."""
        return self.has(name) or is_known(name)

    def check(self, config: Mapping[str, Any], source: str) -> dict[str, Any]:
        """A configuration of a file, without what would be fetched or written elsewhere; nothing foreign is imported.

        Weights to start from are left out, since those of the file take their place, and so are `download` and a
        `cache_dir` that holds no cache of fomal's yet: give these on the command line.

        Args:
            config: plain values, as they were read.
            source: the file, for messages.

        Raises:
            ValueError: it names something that is not trusted, quoting the option for it; an address; or something
                that is no plain value.
        """
        names = list(_named(config, source))
        for where, name in names:
            self._refuse(name, where, source)
        cleaned: dict[str, Any] = self.cleaned(config, source)
        return cleaned

    def check_classes(self, parsed: Any, source: str) -> None:
        """Check the classes of a configuration that has been parsed, which resolves short names; nothing is built yet.

        Raises:
            ValueError: one is not trusted.
        """
        if isinstance(parsed, list | tuple):
            for part in parsed:
                self.check_classes(part, source)
        elif hasattr(parsed, "items"):
            for key, part in parsed.items():
                if key.rpartition(".")[2] == "class_path" and isinstance(part, str):  # a namespace joins its keys
                    self._refuse(part, key, source)
                self.check_classes(part, source)

    def _refuse(self, name: str, where: str, source: str) -> None:
        if self.allows(name):
            return
        raise ValueError(
            f"{source} names {name} ({where}), which is not fomal's: if you trust it, add --trust {name} (in Python "
            f"trust=[{name!r}])."
        )

    def cleaned(self, value: Any, source: str) -> Any:
        """A configuration, or a part of it, without what `check` leaves out, whoever wrote it."""
        if isinstance(value, list | tuple):
            return [self.cleaned(part, source) for part in value]
        if not isinstance(value, Mapping):
            return value
        cleaned = {key: self.cleaned(part, source) for key, part in value.items()}
        name = cleaned.get("class_path", "")
        for settings in (cleaned.get("init_args"), cleaned.get("dict_kwargs")):
            if isinstance(settings, dict) and name.startswith("fomal.data."):
                settings.pop("download", None)
                if not _has_cache(settings.get("cache_dir")):
                    settings.pop("cache_dir", None)
            if isinstance(settings, dict):
                _drop_weights(name, settings, source)
        if isinstance(cleaned.get("options"), dict):
            _drop_weights(str(cleaned.get("factory")), cleaned["options"], source)
        return cleaned


def check_states(states: Any) -> None:
    """Refuse files of earlier checkpoints that are not beside each other: Lightning deletes what is no longer best.

    Args:
        states: those of callbacks in a checkpoint, by their names; None where there are none.

    Raises:
        ValueError: naming the file.
    """
    for name, state in (states if isinstance(states, Mapping) else {}).items():
        if not isinstance(state, Mapping):
            continue
        best = state.get("best_k_models")
        files = [*(best if isinstance(best, Mapping) else ())]
        files += [state.get(f"{kind}_model_path") for kind in ("best", "last", "kth_best")]
        outside = [str(file) for file in files if ".." in Path(str(file)).parts]
        if outside:
            raise ValueError(f"ckpt_path: the state of {name} in it names {outside[0]}, outside of its folder.")


def is_known(name: str) -> bool:
    """Tell whether `name` is trusted without a word: a public class or network function defined where it is named."""
    if name == _TIMM:
        return _is_installed("timm")
    if name.startswith("lightning.pytorch."):
        kind, _, last = name.removeprefix("lightning.pytorch.").partition(".")
        return last in _LIGHTNING.get(kind, ())
    package = next((package for package in _BASES if name.startswith(f"{package}.")), None)
    found = None if package is None else _resolved(name, package)
    if package is None or found is None or not _is_within(getattr(found, "__module__", None), package):
        return False
    if inspect.isclass(found):
        bases = {f"{base.__module__}.{base.__qualname__}" for base in found.__mro__}
        return bool(bases & _BASES[package]) and f"{found.__module__}.{found.__qualname__}" not in _NOT
    return package == "torchvision.models" and _is_classifier(found)


def _is_classifier(function: Any) -> bool:
    """Tell whether it is a function of torchvision for a classifier: others fetch weights without being asked."""
    models = importlib.import_module("torchvision.models")
    name = getattr(function, "__name__", "")
    return name in models.list_models(module=models) and models.get_model_builder(name) is function


def _resolved(name: str, package: str) -> Any:
    """The object at `name`, by way of the package's own modules alone; None where there is none."""
    found: Any = importlib.import_module(package)
    path = package
    for part in name.removeprefix(f"{package}.").split("."):
        path = f"{path}.{part}"
        if not isinstance(found, ModuleType) or not part.isidentifier() or part.startswith("_"):
            return None
        if not hasattr(found, part) and hasattr(found, "__path__") and importlib.util.find_spec(path):
            importlib.import_module(path)
        found = getattr(found, part, None)
        if isinstance(found, ModuleType) and found.__name__ != path:
            return None
    return found


def _is_within(module: str | None, package: str) -> bool:
    return module is not None and f"{module}.".startswith(f"{package}.")


def _is_defined_in(name: str, package: str) -> bool:
    """Tell whether the object at `name`, within a package that the user trusts, is not one that the package imports."""
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    found = _resolved(name, package)
    return _is_within(getattr(found, "__module__", None), package)


def _is_installed(package: str) -> bool:
    """Tell whether Python would import `package` from where it was installed, not from the current folder."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return True  # importing it says what to install
    try:
        wanted = importlib.metadata.distribution(package).locate_file(f"{package}/__init__.py")
    except importlib.metadata.PackageNotFoundError:
        return False
    return Path(str(wanted)).resolve() == Path(spec.origin).resolve()


def _named(config: Any, source: str) -> Iterator[tuple[str, str]]:
    """The names in a configuration, each after the setting it is in."""
    seen = 0
    todo: list[tuple[tuple[str, ...], Any]] = [((), config)]
    while todo:
        where, value = todo.pop()
        seen += 1
        setting = ".".join(where)
        if seen > _MOST or len(where) > _DEEPEST:
            raise ValueError(f"{source}: its configuration is larger than any of fomal's ({setting[:80]}).")
        if isinstance(value, Mapping):
            for key, part in value.items():
                dotted = isinstance(key, str) and "." in key and where[:1] != ("replicas",)
                beside = "class_path" in value and key not in ("class_path", "init_args", "dict_kwargs")
                if not isinstance(key, str) or key.startswith("__") or dotted or beside:
                    raise ValueError(f"{source}: {key!r:.80} is no setting ({setting or 'at its top'}).")
                todo.append(((*where, key), part))
        elif isinstance(value, list | tuple):
            todo += [((*where, str(place)), part) for place, part in enumerate(value)]
        elif not isinstance(value, _PLAIN):
            raise ValueError(f"{source}: {setting} is a {type(value).__name__}, not a plain value.")
        elif where and where[-1] in _NAMES:
            yield setting, _name(value, setting, source)
        elif isinstance(value, str):
            if "://" in value or "class_path" in value:
                what = "an address" if "://" in value else "a configuration as text"
                raise ValueError(f"{source}: {setting} is {what}, {value[:60]!r}: nothing is read from there.")
            if _could_be_imported(value.strip(), where):
                yield setting, value.strip()
            elif any(sign in value for sign in "[{:\n"):  # the parser takes such text for lists and mappings
                inside = _as_yaml(value)
                if isinstance(inside, dict | list):
                    todo.append(((*where, "text"), inside))


def _name(value: Any, setting: str, source: str) -> str:
    if not isinstance(value, str) or not _DOTTED.fullmatch(value):
        raise ValueError(f"{source}: {setting}={value!r:.80} is no import path, e.g. fomal.models.Conv4.")
    return value


def _could_be_imported(text: str, where: tuple[str, ...]) -> bool:
    if not _DOTTED.fullmatch(text) or _TEXTS & set(where[-2:]):
        return False
    top = text.partition(".")[0]
    return top in sys.modules or importlib.util.find_spec(top) is not None


def _as_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None  # the parser cannot either


def _has_cache(folder: Any) -> bool:
    return isinstance(folder, str) and any(Path(folder).expanduser().glob("*.cache"))


def _drop_weights(name: str, settings: dict[str, Any], source: str) -> None:
    """Leave out the weights that a network of torchvision's or timm's would begin with; refuse those of other files."""
    if name.startswith("torchvision.models."):
        last = name.rpartition(".")[2]
        if settings.pop("weights", None) and last in ("googlenet", "inception_v3"):
            settings.setdefault("transform_input", True)  # which weights bring along
            if last == "googlenet":
                settings.setdefault("aux_logits", False)
        settings.pop("weights_backbone", None)
        settings.pop("pretrained", None)
    if name == _TIMM:
        settings.pop("pretrained", None)
        reads = [key for key in _TIMM_READS if settings.get(key) is not None]
        model = settings.get("model_name")
        if reads or (isinstance(model, str) and re.search(r"[:/\\]", model)):
            what = reads[0] if reads else f"model_name={model!r}"
            raise ValueError(f"{source}: {what} of {name} reads weights from elsewhere: name a model of timm's alone.")
