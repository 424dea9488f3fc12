"""The verb classify: an adapted model's classes for images."""

from __future__ import annotations

import argparse
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
from fomal.adaptation.folder import ABOUT, SUPPORT, WEIGHTS
from fomal.cli.adapt import check_device
from fomal.cli.arguments import Arguments
from fomal.cli.compare import check_kind, save
from fomal.cli.errors import UsageError
from fomal.cli.given import TRUST_HELP
from fomal.cli.images import add_image_options, selection, table_settings
from fomal.data.images.columns import TableSettings
from fomal.data.images.image_files import report
from fomal.data.images.manifest import by_labels
from fomal.data.images.selection import tell_left_out
from fomal.data.images.source import FileSource, Source, is_archive, open_source
from fomal.data.images.store import Decoding, scan
from fomal.plots.contact_sheet import SHOWN, contact_sheet
from fomal.utils.checks import first_line
from fomal.utils.files import atomic_replace, check_path, check_writable, refuse_overwriting
from fomal.utils.output import quoted, shown, tell
from fomal.utils.terminal import PlainConsole

_AT_ONCE = 256  # images in memory, unless they are to be seen together
_WIDEST = 15  # classes of a confusion matrix that fits a terminal


def run(verb: str, args: Sequence[str]) -> Predictions:
    """Parse `args`, classify, write the table; return the predictions of the images that could be read.

    Raises:
        UsageError: a mistake in the command line.
        FileNotFoundError: there is no such model, or no such image.
        ValueError: images cannot be used; unless --on_error says otherwise, after the others were classified.
    """
    given = _parse(verb, args)
    settings = table_settings(given)
    model = Adapted.load(given.adapted, given.device, given.trust)
    source, lacking = _source(given.images)
    _refuse_overwriting(given, source)
    meant, left_out = selection(given).split(source, source.images)
    tell_left_out(source.label, {**source.left_out, **left_out})
    known = _known(source, given, settings)
    _, problems = scan(source, meant, model.image_format)  # before anything is written
    problems = lacking | problems
    if given.on_error != "row" or len(problems) == len(meant) + len(lacking):
        report(source.label, problems, [], "raise" if given.on_error == "row" else given.on_error)
    if given.on_error == "skip":
        meant, lacking = [name for name in meant if name not in problems], {}
    if not meant:
        raise ValueError(f"{source.label} has no image to classify.")
    images = _Images(Decoding(source, meant, model.image_format), problems)
    predictions = _write(given.out, model, images, lacking, given.transductive, given.on_error == "row")
    names = [name for name in meant if name not in problems]
    tell(f"{len(names)} images: {_counts(predictions)}. The table is {given.out}.")
    truth = _truth(names, model.classes) if known is None else [known.get(name) for name in names]
    if any(label in model.classes for label in truth):
        _print_accuracy(model.classes, truth, predictions, "in folders of" if known is None else "with")
    if given.sheet is not None:
        pixels = images.read([meant.index(name) for name in names[:SHOWN]])[1]
        save(contact_sheet(pixels, predictions.labels, predictions.probabilities.amax(1), truth), given.sheet)
        tell(f"The sheet is {given.sheet}.")
    if problems and given.on_error == "row":
        report(f"{given.out} is written, but {source.label}", problems, [], "raise")
    return predictions


def _parse(verb: str, args: Sequence[str]) -> argparse.Namespace:
    parser = Arguments(verb, "--adapted DIR --images DIR_OR_FILE... --out FILE.csv [options]", str(__doc__))
    parser.add_argument("--adapted", type=Path, required=True, help="folder written by `fomal adapt`")
    parser.add_argument("--images", nargs="+", required=True, help="files, or one folder, zip, tar or npz")
    parser.add_argument("--out", type=Path, required=True, help="table to write: file, label, probabilities, error")
    parser.add_argument("--sheet", type=Path, help=f"figure of the first {SHOWN} images with their labels")
    add_image_options(parser)
    parser.add_argument(
        "--transductive", action="store_true", help="let batch norm see all images together, and only them"
    )
    parser.add_argument(
        "--on_error",
        choices=("row", "raise", "skip"),
        default="row",
        help="about unusable images: classify the others, give each a row with its error, and exit with 1 (row); write "
        "nothing (raise); leave them out (skip)",
    )
    parser.add_argument("--trust", action="append", metavar="NAME", help=TRUST_HELP)
    parser.add_argument("--device", default="cpu", help="e.g. cuda")
    given = parser.parse(args)
    check_device(given.device)
    check_path("adapted", given.adapted)
    check_writable("out", given.out)
    if given.sheet is not None:
        check_kind(given.sheet, "--sheet")
        if given.sheet.absolute() == given.out.absolute():
            raise UsageError(f"--sheet {given.sheet} is the table of --out too: give another name.")
    return given


def _source(images: Sequence[str]) -> tuple[Source, dict[str, str]]:
    """One folder or archive, or files; and those of several files that are not there, with what is wrong."""
    for path in images:
        check_path("images", path)
    only = Path(images[0]).expanduser()
    if len(images) == 1 and (only.is_dir() or is_archive(only)):
        return open_source(images[0], "images"), {}
    folders = [path for path in images if Path(path).is_dir()]
    if folders:
        raise UsageError(f"--images {folders[0]}: give one folder alone, or files.")
    there = [path for path in images if Path(path).is_file()]
    gone = {*images} - {*there}
    lacking = {path: "no regular file" if Path(path).exists() else "no such file" for path in images if path in gone}
    return FileSource(there or images, "images"), lacking


def _refuse_overwriting(given: argparse.Namespace, source: Source) -> None:
    """Raise WriteError where what is to be written would take the place of an image, the labels or the model."""
    read = [*given.images, *(given.labels or ()), *(given.adapted / name for name in (ABOUT, WEIGHTS, SUPPORT))]
    if Path(given.images[0]).expanduser().is_dir():
        root = Path(given.images[0]).expanduser()
        read += [root / name for name in (*source.images, *(given.labels or ()))]
    refuse_overwriting("out", given.out, read)
    if given.sheet is not None:
        refuse_overwriting("sheet", given.sheet, read)


def _known(source: Source, given: argparse.Namespace, settings: TableSettings) -> dict[str, str] | None:
    """The class of each file by --labels; None without it."""
    if given.labels is None:
        return None
    on_error = "raise" if given.on_error == "raise" else "skip"
    listing = by_labels(source, given.labels, settings, on_error=on_error)
    return {file.name: file.label for file in listing.files}


class _Images:
    """Images of which some cannot be read: `problems` says which, and learns of more."""

    def __init__(self, images: Decoding, problems: dict[str, str]) -> None:
        self.images, self.problems, self.names = images, problems, images.names

    def read(self, places: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        """Those of the images at `places` that can be read: their places and pixels (M, C, H, W) uint8."""
        good = [place for place in places if self.names[place] not in self.problems]
        try:
            return good, self.images.index_select(0, torch.tensor(good, dtype=torch.int64))
        except ValueError:  # a file has changed meanwhile: which?
            for place in good:
                try:
                    self.images.index_select(0, torch.tensor([place]))
                except ValueError as error:
                    self.problems[self.names[place]] = (
                        f"it has become unreadable: {first_line(error.__cause__ or error)}"
                    )
            return self.read(good)


def _write(
    out: Path, model: Adapted, images: _Images, lacking: dict[str, str], transductive: bool, errors: bool
) -> Predictions:
    """Classify and write the table, few images in memory at once; with `errors` it has a column of them."""
    labels: list[str] = []
    probabilities = [torch.empty(0, len(model.classes))]
    blank = [""] * (1 + len(model.classes))
    with atomic_replace(out, keep=True) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(map(quoted, ["file", "label", *model.classes, *(["error"] if errors else [])]))
        for places in _parts(len(images.names), transductive):
            good, pixels = images.read(places.tolist())
            part = model.predict_pixels(pixels, transductive)
            shares = [[f"{p:.6f}" for p in row] for row in part.probabilities.tolist()]
            cells = {place: [label, *row] for place, label, row in zip(good, part.labels, shares, strict=True)}
            for place in places.tolist():
                name = images.names[place]
                row = [name, *cells.get(place, blank), *([images.problems.get(name, "")] if errors else [])]
                writer.writerow(map(quoted, row))
            labels += part.labels
            probabilities.append(part.probabilities)
        writer.writerows([quoted(name), *blank, quoted(reason)] for name, reason in lacking.items())
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


def _print_accuracy(
    classes: Sequence[str], truth: Sequence[str | None], predictions: Predictions, how: str = "in folders of"
) -> None:
    known = [(label, found) for label, found in zip(truth, predictions.labels, strict=True) if label in classes]
    right = sum(label == found for label, found in known)
    low, high = wilson(right, len(known))
    left = f"; {len(truth) - len(known)} images are {how} no class" if len(known) < len(truth) else ""
    tell(
        f"Accuracy {100 * right / len(known):.1f} % ({right} of {len(known)} images {how} their classes; 95 % "
        f"interval {100 * low:.1f} to {100 * high:.1f} %{left})."
    )
    PlainConsole().print(_confusion(classes, [(str(label), found) for label, found in known]))


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
