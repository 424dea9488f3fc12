"""The verb classify: an adapted model's classes for images."""

from __future__ import annotations

import csv
import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch
from rich.table import Table
from torchmetrics.functional.classification import multiclass_confusion_matrix

from fomal.adaptation import Adapted, Predictions
from fomal.cli.adapt import check_device
from fomal.cli.arguments import Arguments
from fomal.cli.compare import check_kind, save
from fomal.cli.errors import UsageError
from fomal.cli.given import TRUST_HELP
from fomal.data.image_files import report
from fomal.data.source import FileSource, Source, is_archive, open_source
from fomal.data.store import Decoding, scan
from fomal.files import atomic_replace
from fomal.output import quoted, shown, tell
from fomal.plots.contact_sheet import SHOWN, contact_sheet
from fomal.terminal import PlainConsole

_AT_ONCE = 256  # images in memory, unless they are to be seen together
_WIDEST = 15  # classes of a confusion matrix that fits a terminal


def run(verb: str, args: Sequence[str]) -> Predictions:
    """Parse `args`, classify, write the table; return the predictions.

    Raises:
        UsageError: a mistake in the command line.
        FileNotFoundError: there is no such model, or no such image.
        ValueError: images cannot be used.
    """
    parser = Arguments(verb, "--adapted DIR --images DIR_OR_FILE... --out FILE.csv [options]", str(__doc__))
    parser.add_argument("--adapted", type=Path, required=True, help="folder written by `fomal adapt`")
    parser.add_argument("--images", nargs="+", required=True, help="files, or one folder, zip, tar or npz")
    parser.add_argument("--out", type=Path, required=True, help="table to write: file, label, probabilities")
    parser.add_argument("--sheet", type=Path, help=f"figure of the first {SHOWN} images with their labels")
    parser.add_argument(
        "--transductive", action="store_true", help="let batch norm see all images together, and only them"
    )
    parser.add_argument("--on_error", choices=("raise", "skip"), default="raise", help="about unusable images")
    parser.add_argument("--trust", action="append", metavar="NAME", help=TRUST_HELP)
    parser.add_argument("--device", default="cpu", help="e.g. cuda")
    given = parser.parse(args)
    check_device(given.device)
    if given.sheet is not None:
        check_kind(given.sheet, "--sheet")
    model = Adapted.load(given.adapted, given.device, given.trust)
    source = _source(given.images)
    _, problems = scan(source, source.images, model.image_format)  # before anything is written
    report(source.label, problems, [], given.on_error)
    names = [name for name in source.images if name not in problems]
    if not names:
        raise ValueError(f"{source.label} has no image to classify.")
    images = Decoding(source, names, model.image_format)
    predictions = _write(given.out, model, images, given.transductive)
    tell(f"{len(names)} images: {_counts(predictions)}. The table is {given.out}.")
    truth = _truth(names, model.classes)
    if any(truth):
        _print_accuracy(model.classes, truth, predictions)
    if given.sheet is not None:
        pixels = images.index_select(0, torch.arange(min(SHOWN, len(names))))
        certain = predictions.probabilities.amax(1)
        save(contact_sheet(pixels, predictions.labels, certain, truth), given.sheet)
        tell(f"The sheet is {given.sheet}.")
    return predictions


def _source(images: Sequence[str]) -> Source:
    """One folder or archive, or files."""
    only = Path(images[0]).expanduser()
    if len(images) == 1 and (only.is_dir() or is_archive(only)):
        return open_source(images[0], "images")
    folders = [path for path in images if Path(path).is_dir()]
    if folders:
        raise UsageError(f"--images {folders[0]}: give one folder alone, or files.")
    return FileSource(images, "images")


def _write(out: Path, model: Adapted, images: Decoding, transductive: bool) -> Predictions:
    """Classify and write the table, few images in memory at once."""
    labels: list[str] = []
    probabilities = [torch.empty(0, len(model.classes))]
    with atomic_replace(out, keep=True) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(map(quoted, ["file", "label", *model.classes]))
        for places in _parts(len(images.names), transductive):
            part = model.predict_pixels(images.index_select(0, places), transductive)
            for place, label, row in zip(places.tolist(), part.labels, part.probabilities.tolist(), strict=True):
                writer.writerow([quoted(images.names[place]), quoted(label), *(f"{p:.6f}" for p in row)])
            labels += part.labels
            probabilities.append(part.probabilities)
    return Predictions(labels, torch.cat(probabilities))


def _parts(total: int, transductive: bool) -> Iterator[torch.Tensor]:
    yield from torch.arange(total).split(total if transductive else _AT_ONCE)  # type: ignore[no-untyped-call]


def _counts(predictions: Predictions) -> str:
    return ", ".join(f"{label} {count}" for label, count in Counter(predictions.labels).most_common(10))


def _truth(names: Sequence[str], classes: Sequence[str]) -> list[str | None]:
    """The class whose folder each file is in; None where its folders are no classes."""
    found: list[str | None] = []
    for name in names:
        parts = PurePosixPath(unicodedata.normalize("NFC", name)).parent.parts
        paths = ["/".join(parts[i:j]) for j in range(len(parts), 0, -1) for i in range(j)]  # the deepest first
        found.append(next((path for path in paths if path in classes), None))
    return found


def _print_accuracy(classes: Sequence[str], truth: Sequence[str | None], predictions: Predictions) -> None:
    known = [(label, found) for label, found in zip(truth, predictions.labels, strict=True) if label is not None]
    right = sum(label == found for label, found in known)
    low, high = wilson(right, len(known))
    left = f"; {len(truth) - len(known)} images are in folders of no class" if len(known) < len(truth) else ""
    tell(
        f"Accuracy {100 * right / len(known):.1f} % ({right} of {len(known)} images in folders of their classes; 95 % "
        f"interval {100 * low:.1f} to {100 * high:.1f} %{left})."
    )
    PlainConsole().print(_confusion(classes, known))


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, of Wilson 1927, which holds for small numbers too."""
    z, share = 1.959964, right / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return middle - half, middle + half


def _confusion(classes: Sequence[str], known: Sequence[tuple[str, str]]) -> Table:
    """The confusion matrix; of many classes, the most frequent confusions."""
    place = {label: i for i, label in enumerate(classes)}
    target, found = (torch.tensor([place[pair[side]] for pair in known]) for side in (0, 1))
    matrix = multiclass_confusion_matrix(found, target, len(classes))  # (true, predicted)
    if len(classes) <= _WIDEST:
        table = Table(title="rows: true class; columns: predicted class")
        table.add_column("")
        for label in classes:
            table.add_column(shown(label), justify="right", overflow="fold")
        for label, row in zip(classes, matrix.tolist(), strict=True):
            table.add_row(shown(label), *map(str, row))
        return table
    table = Table("true class", "predicted class", "images", title="most frequent confusions")
    wrong = matrix - matrix.diag().diag()
    for flat in wrong.flatten().argsort(descending=True, stable=True)[:20].tolist():
        true, predicted = divmod(flat, len(classes))
        if wrong[true, predicted]:
            table.add_row(shown(classes[true]), shown(classes[predicted]), str(int(wrong[true, predicted])))
    return table
