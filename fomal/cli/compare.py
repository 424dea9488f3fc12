"""The verb compare: several runs in one figure and one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from fomal.cli.arguments import Arguments
from fomal.cli.errors import UsageError, did_you_mean
from fomal.plots.compare import compare_figure, name_of, scale_of
from fomal.plots.runs import Method, Run, differing_settings, find_runs, methods, read_run
from fomal.plots.save import save_figure
from fomal.utils.files import check_path, check_writable, write_csv
from fomal.utils.output import say, shown, tell
from fomal.utils.terminal import PlainConsole

# Files of a run that a table beside a figure of the same name would replace.
_OF_A_RUN = ("metrics", "predictions")
CAPTION = "± is the 95 % interval over test tasks; it says nothing of training anew."


def run(verb: str, args: Sequence[str]) -> list[Method]:
    """Parse `args`, draw and print; return the methods compared.

    Raises:
        UsageError: there is nothing to compare or to draw.
        ValueError: a file of a run is damaged.
    """
    parser = Arguments(verb, "RUN... --out figure.png [--metric NAME] [--labels TEXT ...]", str(__doc__))
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of several")
    parser.add_argument("--out", type=Path, required=True, help="figure to write; a table is written beside it as .csv")
    parser.add_argument("--metric", help="e.g. accuracy_transductive; by default accuracy, or loss")
    parser.add_argument("--labels", nargs="+", help="names for the methods, in the order of the table")
    given = parser.parse(args)
    check_figure(given.out)
    found = methods(_read(given.runs))
    if given.labels:
        if len(given.labels) != len(found):
            raise UsageError(
                f"--labels gives {len(given.labels)} names, but there are {len(found)} methods: "
                f"{'; '.join(method.label for method in found)}."
            )
        found = [Method(label, method.runs) for label, method in zip(given.labels, found, strict=True)]
    metric = choose_metric(found, given.metric)
    table = given.out.with_suffix(".csv")
    save(compare_figure(found, metric), given.out)
    write_rows(table, [{"label": method.label} | row for method in found for row in rows(method)])
    print_table(found)
    differing = differing_settings([method.runs for method in found])
    differing = [key for key in differing if key.rpartition(".")[0] not in differing]  # another class says it all
    if differing and not given.labels:
        tell(f"The methods differ in {', '.join(differing)}; labels name the fewest that tell them apart.")
    tell(f"The figure is {given.out}, the table {table}.")
    return found


def _read(paths: Sequence[Path]) -> list[Run]:
    """The runs in the folders; those that have only begun, and have nothing to show yet, are left out."""
    folders: dict[Path, None] = {}
    for path in paths:
        check_path("RUN", path)
        if not path.is_dir():
            raise UsageError(f"{path}: there is no such folder; give the folder of a run, with its metrics.csv.")
        inside = find_runs(path)
        if not inside:
            raise UsageError(f"{path} holds no run: there is neither a metrics.csv nor a results.json in it.")
        folders |= dict.fromkeys(inside)
    runs = [read_run(folder) for folder in folders]
    for one in runs:
        if not one.metrics():
            say(f"{one.folder} is left out: it has neither been validated nor tested yet.")
    if not (shown := [one for one in runs if one.metrics()]):
        raise UsageError("there is nothing to compare: no run has been validated or tested yet.")
    return shown


def check_kind(path: Path, option: str = "--out") -> None:
    """Raise UsageError for a figure that matplotlib does not write."""
    check_writable(option, path)
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise UsageError(f"{option} {path}: a figure can be {', '.join(f'.{kind}' for kind in sorted(kinds))}.")


def check_figure(path: Path) -> None:
    """As `check_kind`; raise UsageError too where the table beside the figure would replace a run's file."""
    check_kind(path)
    table = path.with_suffix(".csv")
    if table.stem.partition("_")[0] in _OF_A_RUN and table.exists():
        raise UsageError(f"--out {path}: its table would replace {table}, which a run wrote; give another name.")


def choose_metric(found: Sequence[Method], asked: str | None = None) -> str:
    """The figure to draw: `asked`, else accuracy if any method has it, else loss.

    Raises:
        UsageError: not every method has it.
    """
    there = dict.fromkeys(name for method in found for name in method.metrics())
    metric = (
        asked.removeprefix("val/").removeprefix("test/") if asked else "accuracy" if "accuracy" in there else "loss"
    )
    lacking = [method for method in found if metric not in method.metrics()]
    if not lacking:
        return metric
    common = [name for name in there if all(name in method.metrics() for method in found)]
    remedy = f"in common they have {', '.join(common)}" if common else "they have no metric in common: give fewer runs"
    hint = did_you_mean(metric, common) or f"; {remedy}."
    of = f"{lacking[0].runs[0].folder} has" if len(lacking) < len(found) else "the runs have"
    raise UsageError(f"--metric {metric}: {of} no such figure{hint}")


def save(figure: Figure, path: Path) -> None:
    """Write a figure; its folder is made."""
    save_figure(figure, path)


def rows(method: Method) -> list[dict[str, object]]:
    """The results of each run of a method, for a table in a file, and of several their mean."""
    found = [row(run) for run in method.runs]
    if len(found) > 1:
        means = {name: method.final(name) for name in method.metrics()}
        figures = _figures({name: mean for name, mean in means.items() if mean is not None})
        found.append({"seed": "mean", "tasks": sum(run.tasks for run in method.runs)} | figures)
    return found


def row(run: Run) -> dict[str, object]:
    """The results of one run, for a table in a file."""
    about = {"seed": run.settings.get("seed_everything"), "meta_iterations": run.meta_iterations, "tasks": run.tasks}
    return about | _figures(run.final) | {"folder": str(run.folder)}


def _figures(final: dict[str, tuple[float, float]]) -> dict[str, object]:
    return {key: value for name, (mean, ci) in final.items() for key, value in ((name, mean), (f"{name}_ci95", ci))}


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write rows as CSV, with the columns of all of them."""
    columns = sorted(dict.fromkeys(name for one in rows for name in one), key="folder".__eq__)  # that one last
    write_csv(path, columns, rows)


def print_table(found: Sequence[Method], title: str | None = None) -> None:
    """Print the test results of each method, means over its seeds."""
    table = Table(title=title, caption=CAPTION)
    table.add_column("method", min_width=12, overflow="fold")
    for column in ("seeds", "meta-\niterations", "tasks"):
        table.add_column(column, justify="right")
    names = dict.fromkeys(name for method in found for run in method.runs for name in run.final)
    for name in names:
        heading = name_of(name).replace(" ", "\n", name.count("_"))
        table.add_column(heading, justify="right")
    for method in found:
        trained = sorted({run.meta_iterations for run in method.runs if run.meta_iterations is not None})
        tasks = sum(run.tasks for run in method.runs)
        about = [str(len(method.runs)), " to ".join(map(str, trained[:1] + trained[1:][-1:])) or "-", str(tasks or "-")]
        table.add_row(shown(method.label), *about, *(cell(name, method.final(name)) for name in names))
    PlainConsole().print(table)


def cell(metric: str, estimate: tuple[float, float] | None) -> str:
    """A mean with its interval, accuracies in per cent."""
    scale, unit = scale_of(metric)
    digits = ".2f" if unit else ".4f"
    return "-" if estimate is None else f"{scale * estimate[0]:{digits}} ± {scale * estimate[1]:{digits}}"
