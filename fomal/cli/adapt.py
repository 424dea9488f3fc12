"""The verb adapt: a checkpoint learns the classes of a folder of images."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, Namespace

from fomal.adaptation import Adapted, adapt
from fomal.adaptation.from_checkpoint import image_format_of
from fomal.adaptation.model import refuse_existing
from fomal.cli.arguments import about
from fomal.cli.errors import UsageError
from fomal.cli.explain import explain, what_was_raised
from fomal.cli.given import TRUST_HELP, take_trust
from fomal.cli.help import HelpFormatter
from fomal.cli.images import add_image_options, selection, table_settings
from fomal.data.images.columns import AUTOMATIC, TableSettings
from fomal.data.images.image_files import usable
from fomal.data.images.image_format import ImageFormat
from fomal.data.images.manifest import list_images
from fomal.data.images.selection import EVERY, Selection, tell_left_out
from fomal.data.images.source import open_source
from fomal.data.images.store import Decoding, scan
from fomal.inner.optimizer import InnerOptimizer
from fomal.run.checkpoints import find, verify
from fomal.utils.checks import first_line
from fomal.utils.files import check_path, check_writable, refuse_unreadable
from fomal.utils.output import tell

_LONGEST = 300  # characters of torch's reason
_SHOWN = 10  # classes named in the message
_FEW = 10  # times that an image is seen; the evaluations of the paper see each 50 times or 10


def run(verb: str, args: Sequence[str]) -> Adapted:
    """Parse `args`, adapt, and write the model's folder; return the model.

    Raises:
        UsageError: a mistake in the command line.
        FileExistsError: there is such a folder already.
        FileNotFoundError: there is no such checkpoint, or no such folder of images.
        ValueError: images cannot be used, or do not fit the checkpoint.
    """
    args, trust = take_trust(args)
    given = _parse(verb, args)
    check_writable("out", given.out, folder=True)
    refuse_existing(given.out, "out")
    table = table_settings(given), selection(given)
    _check_checkpoint(given.ckpt_path)
    image_format = image_format_of(given.ckpt_path, trust)
    pixels, labels = read_support(given.support, image_format, given.on_error, given.labels, *table)
    settings = {"steps": given.steps, "batch_size": given.batch_size, "optimizer": given.optimizer, "seed": given.seed}
    adapted = adapt(given.ckpt_path, pixels, labels, device=given.device, trust=trust, **settings)
    adapted.save(given.out)
    about = adapted.about["adaptation"]
    counts = [f"{label} {count}" for label, count in Counter(labels).most_common()]
    more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
    tell(f"Adapted to {len(counts)} classes with {len(labels)} images: {', '.join(counts[:_SHOWN])}{more}.")
    seen = about["steps"] * about["batch_size"] / len(labels)
    tell(
        f"{about['steps']} steps of {about['batch_size']} images, so each was seen {seen:.1f} times; the loss of a "
        f"mini-batch went from {about['loss_first_step']:.3f} to {about['loss_last_step']:.3f}."
    )
    if seen < _FEW:
        tell(f"That is little: --steps {math.ceil(_FEW * len(labels) / about['batch_size'])} would make it {_FEW}.")
    tell(f"The model is in {given.out}; to use it: fomal classify --adapted {given.out} --images DIR --out labels.csv")
    return adapted


def _parse(verb: str, args: Sequence[str]) -> Namespace:
    parser = ArgumentParser(
        f"fomal {verb}",
        usage=f"fomal {verb} --ckpt_path FILE --support DIR --out DIR [--KEY VALUE ...]",
        description=about(verb, __doc__),
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--ckpt_path", type=Path, required=True, help="a checkpoint of `fomal fit` on images")
    parser.add_argument(
        "--support", type=str, required=True, help="folder, zip, tar or npz with a folder of images per class"
    )
    add_image_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model into; must not exist")
    parser.add_argument("--steps", type=int | None, help="inner steps; by default those of the checkpoint's evaluation")
    parser.add_argument("--batch_size", type=int | None, help="images per step; likewise")
    parser.add_argument("--optimizer", type=InnerOptimizer | None, help="inner optimiser; by default the checkpoint's")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of mini-batches")
    parser.add_argument("--on_error", type=Literal["raise", "skip"], default="raise", help="about unusable images")
    parser.add_argument("--trust", default=SUPPRESS, metavar="NAME", help=TRUST_HELP)  # is taken before parsing
    parser.add_argument("--device", type=str, default="cpu", help="e.g. cuda")
    try:
        parsed = parser.parse_args(list(args))
    except ArgumentError as error:
        raise UsageError(explain(str(error), parser)) from error
    with what_was_raised():
        given: Namespace = parser.instantiate(parsed)
    check_device(given.device)
    return given


def _check_checkpoint(path: Path) -> None:
    """Name the option where there is no checkpoint, or none that is whole."""
    try:
        check_path("--ckpt_path", path)
        found, _ = find(path)
        refuse_unreadable(found)  # a device may never end
        verify(found)
    except (OSError, ValueError) as error:
        message = str(error) if str(error).startswith("--") else f"--ckpt_path {error}"
        raise ValueError(message) from error


def check_device(device: str) -> None:
    """Raise UsageError for a device that torch does not have here, or that holds no values."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kinds of device that torch is giving up
            torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = first_line(error)[:_LONGEST]
        raise UsageError(
            f"--device {device or repr(device)} cannot be used: {reason}; use e.g. cpu or cuda."
        ) from error


def read_support(
    folder: str,
    image_format: ImageFormat,
    on_error: str,
    labels: Sequence[str] | None = None,
    settings: TableSettings = AUTOMATIC,
    selected: Selection = EVERY,
) -> tuple[torch.Tensor, list[str]]:
    """The images of a folder or archive, (S, C, H, W) uint8, and the class of each.

    Args:
        folder: its path; each class has a folder in it, unless a table says otherwise.
        image_format: what the images become.
        on_error: about images and rows that cannot be used, "raise" or "skip".
        labels: paths of the table with the classes; see `list_images`.
        settings: how it is written.
        selected: which images are meant.

    Raises:
        FileNotFoundError: there is no such folder, archive or table.
        ValueError: images cannot be used, or are those of several splits, or of fewer than two classes.
    """
    source = open_source(folder, "support")
    listing = list_images(source, labels, settings, selected, on_error)
    tell_left_out(source.label, listing.left_out)
    splits = sorted({file.split for file in listing.files})
    if len(splits) > 1:
        raise ValueError(f"{source.label} has images of several splits, {', '.join(splits)}: give those of one.")
    if len({file.label for file in listing.files}) < 2:
        only = listing.files[0].label if listing.files else "none"
        raise ValueError(f"{source.label} has one class, {only!r}: there must be two at least to tell apart.")
    names = [file.name for file in listing.files]
    digests, problems = scan(source, names, image_format)
    kept = usable(source, listing, problems, digests, on_error)
    pixels = Decoding(source, names, image_format).index_select(0, torch.tensor(kept, dtype=torch.int64))
    return pixels, [listing.files[i].label for i in kept]
