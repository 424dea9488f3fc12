"""The verb export: an adapted model as ONNX or torch.export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fomal.adaptation import Adapted
from fomal.adaptation.export import SUFFIXES, Exported, export
from fomal.cli.arguments import Arguments
from fomal.cli.given import TRUST_HELP
from fomal.utils.files import check_path, check_writable
from fomal.utils.output import tell


def run(verb: str, args: Sequence[str]) -> Exported:
    """Parse `args`, export, and say what the file takes and gives.

    Raises:
        UsageError: a mistake in the command line.
        FileExistsError: there is such a file already.
        FileNotFoundError: there is no such model.
        ModuleNotFoundError: a package for the format is missing.
        ValueError: the network cannot be exported.
    """
    parser = Arguments(verb, "--adapted DIR --format onnx|torch-export [options]", str(__doc__))
    parser.add_argument("--adapted", type=Path, required=True, help="folder written by `fomal adapt`")
    parser.add_argument("--format", choices=list(SUFFIXES), required=True, help="what to write")
    parser.add_argument("--out", type=Path, help="file to write; by default model.onnx or model.pt2 in the folder")
    parser.add_argument(
        "--transductive", action="store_true", help="let batch norm see all images of a batch, and only them"
    )
    parser.add_argument("--trust", action="append", metavar="NAME", help=TRUST_HELP)
    given = parser.parse(args)
    check_path("adapted", given.adapted)
    if given.out is not None:
        check_writable("out", given.out)
    model = Adapted.load(given.adapted, trust=given.trust)
    path = given.out or given.adapted / f"model{SUFFIXES[given.format]}"
    exported = export(model, path, given.format, given.transductive)
    form = model.image_format
    batch = 1 if exported.one_at_a_time else "B"
    tell(f"{path} equals the model on random images.")
    tell(
        f"It takes images ({batch}, {form.channels}, {form.height}, {form.width}) uint8 and gives probabilities "
        f"({batch}, {len(model.classes)}), in the order of the classes in {given.adapted / 'model.json'}."
    )
    if exported.one_at_a_time:
        tell("Batch norm sees each image together with the support set, hence one at a time.")
    return exported
