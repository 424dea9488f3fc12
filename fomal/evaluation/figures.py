"""Units and directions in which the figures of an evaluation are shown, which `results.json` has too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fomal.evaluation.metrics import Metric


@dataclass(frozen=True)
class Quantity:
    """A mean over tasks, and how it is shown.

    Attributes:
        name: e.g. "accuracy_transductive".
        metric: of which metric, e.g. "accuracy".
        unit: the metric's; "%" is shown times 100.
        higher_is_better: the metric's direction; None where there is none.
        before: whether it is of the initialisation, before adaptation.
    """

    name: str
    metric: str
    unit: str = ""
    higher_is_better: bool | None = None
    before: bool = False

    @property
    def scale(self) -> float:
        """The factor that it is shown with."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def is_headline(self) -> bool:
        """Tell whether it says how well was learnt: after adaptation, with a direction."""
        return self.higher_is_better is not None and not self.before

    @property
    def is_logarithmic(self) -> bool:
        """Tell whether it is drawn on a logarithmic scale, where all values are above 0: errors, but no shares."""
        return self.higher_is_better is False and self.unit != "%"

    @property
    def title(self) -> str:
        """The text at an axis or above a column, e.g. "accuracy transductive, %"."""
        return self.name.replace("_", " ") + (f", {self.unit}" if self.unit else "")

    def text(self, value: float) -> str:
        """A value, or a half-width, without its unit."""
        return f"{self.scale * value:{'.2f' if self.unit == '%' else '.4f'}}"

    def with_unit(self, value: float) -> str:
        """A value with its unit."""
        return self.text(value) + (f" {self.unit}" if self.unit else "")

    def about(self) -> dict[str, Any]:
        """All but the name, in plain values."""
        return {key: value for key, value in asdict(self).items() if key != "name"}


DISTANCE = Quantity("distance", "distance")
"""Of the adapted parameters from the initialisation."""

_EARLIER = {
    figure.name: figure
    for figure in (
        Quantity("accuracy", "accuracy", "%", True),
        Quantity("accuracy_transductive", "accuracy", "%", True),
        Quantity("loss", "loss", "", False),
        Quantity("loss_before", "loss", "", False, before=True),
        DISTANCE,
    )
}
"""The figures of runs that did not write down how they are shown."""


def reported(metrics: Iterable[Metric | Quantity], both: bool, before: bool) -> list[Quantity]:
    """The figures of an evaluation, without the distance.

    Args:
        metrics: what is measured.
        both: whether under both protocols, or with all queries in one forward pass alone.
        before: whether before adaptation too.
    """
    return [
        Quantity(f"{metric.name}{protocol}{when}", metric.name, metric.unit, metric.higher_is_better, bool(when))
        for metric in metrics
        for protocol in (("", "_transductive") if both else ("",))
        for when in (("_before", "") if before else ("",))
    ]


def read_figures(about: Any, names: Iterable[str], source: str) -> dict[str, Quantity]:
    """Read how the figures of a run are shown.

    Args:
        about: what its `results.json` or `metrics.json` says, by names in logs, e.g. "test/accuracy"; None: nothing.
        names: of the figures, with or without the stage.
        source: the file, for messages.

    Raises:
        ValueError: it says something that cannot be meant.
    """
    if about is not None and not isinstance(about, Mapping):
        raise ValueError(f"{source} is damaged: figures is no mapping. Test or train that run again, or leave it out.")
    said = {str(name).partition("/")[2]: part for name, part in (about or {}).items()}
    plain = {name: name.rpartition("/")[2] for name in names}
    return {name: _figure(own, said.get(own), source) for name, own in plain.items()}


def _figure(name: str, about: Any, source: str) -> Quantity:
    if about is None:
        return _EARLIER.get(name, Quantity(name, name))
    kinds: dict[str, tuple[type, ...]] = {
        "metric": (str,),
        "unit": (str,),
        "higher_is_better": (bool, type(None)),
        "before": (bool,),
    }
    if not isinstance(about, Mapping) or any(not isinstance(about.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(
            f"{source} is damaged: figures has {about!r:.80} for {name}. Test or train that run again, or leave it out."
        )
    return Quantity(name, **{key: about[key] for key in kinds})
