"""The verb analyze: what the outer gradients of a model on its tasks are made of."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from rich.progress import track
from rich.table import Table

from fomal.analysis.report import Report, analyze, check_sizes, standard_rules
from fomal.analysis.terms import Coefficients, Estimate, Terms
from fomal.cli.errors import UsageError
from fomal.cli.run import FomalCLI, run_cli
from fomal.inner import SGD, SGLD
from fomal.learner.build import read_checkpoint
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.restoring import check_module, misfits
from fomal.learner.watch import refuse_nonfinite_weights
from fomal.outer.rule import OuterRule
from fomal.plots.taylor import draw_taylor
from fomal.tasks.datamodule import EpisodeDataModule
from fomal.tasks.episode import Episode
from fomal.utils.files import check_writable, write_text
from fomal.utils.output import say, tell
from fomal.utils.terminal import PlainConsole


def run(verb: str, args: Sequence[str]) -> FomalCLI:
    """Parse `args`, build everything, and analyse."""
    return run_cli(AnalyzeCLI, verb, args)


class AnalyzingTrainer(L.Trainer):
    """A trainer with one more method, which does not train: LightningCLI makes verbs of methods."""

    def analyze(
        self,
        model: MetaLearner,
        datamodule: EpisodeDataModule,
        ckpt_path: Path | None = None,
        tasks: int = 100,
        batches: int | None = None,
        lr: float | None = None,
        split: Literal["train", "val", "test"] = "train",
        out: Path = Path("analysis"),
    ) -> Report:
        """Estimate AvgGrad and AvgGradInner, the rules' coefficients of both, and the Taylor residuals.

        Args:
            model: the learner.
            datamodule: its tasks.
            ckpt_path: checkpoint with the weights; without one they are as before training.
            tasks: how many tasks to average over.
            batches: mini-batches per task, of which a rule with a query set uses the last for it; null is as many as
                the config's rule has.
            lr: step size of the inner SGD that is analysed; null is that of the config's inner optimiser.
            split: whose tasks.
            out: folder for `analysis.json` and `taylor.png`.
        """
        batches = max(2, model.train_schedule.steps + model.rule.needs_query) if batches is None else batches
        lr = _inner_lr(model) if lr is None else lr
        check_sizes(tasks, batches, lr)
        check_writable("out", out / "analysis.json")
        model.double()
        if ckpt_path is not None:
            saved = read_checkpoint(ckpt_path)
            with misfits("ckpt_path"):
                check_module(model, saved)
            model.load_state_dict(saved["state_dict"])
            refuse_nonfinite_weights(model.network, "analyze")
        datamodule.prepare_data()
        datamodule.setup("test" if split == "test" else "fit")
        model.to(self.strategy.root_device).eval()
        if model.adapted is not None:  # what the inner loop leaves alone is no part of the expansion
            for name, p in model.network.named_parameters():
                p.requires_grad_(name in model.adapted)

        def episodes(number: torch.Tensor) -> Episode:
            return datamodule.on_after_batch_transfer(datamodule.episodes(split, number).to(model.device), 0)

        report = analyze(
            model.objective,
            model.initialisation(),
            episodes,
            _rules(model, batches),
            tasks=tasks,
            batches=batches,
            batch_size=model.train_schedule.batch_size,
            lr=lr,
            watch=lambda groups, what: track(
                groups, what, console=PlainConsole(stderr=True), disable=not sys.stderr.isatty()
            ),
        )
        if self.is_global_zero:
            _keep(report, out, {"checkpoint": ckpt_path and str(ckpt_path), "split": split, "config": model.config})
        return report


class AnalyzeCLI(FomalCLI):
    """The command line of `fomal analyze`."""

    trainer_type = AnalyzingTrainer

    def before_instantiate_classes(self) -> None:
        """Refuse replicas before anything is built."""
        if self.config[self.verb].get("replicas") is not None:
            raise UsageError("replicas are not analysed together: give the checkpoint of one, or leave --replicas out.")
        super().before_instantiate_classes()

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # a static method there
        """The one verb."""
        return {self.verb: {"model", "datamodule"}}


def _rules(model: MetaLearner, batches: int) -> dict[str, OuterRule]:
    """The standard rules, and the config's own where it is another one and fits the number of mini-batches."""
    rules = standard_rules()
    known = {type(rule) for rule in rules.values() if not hasattr(rule, "order")}
    if type(model.rule) not in known and batches - model.rule.needs_query == model.train_schedule.steps:
        rules[f"{type(model.rule).__name__} of the config"] = model.rule
    return rules


def _inner_lr(model: MetaLearner) -> float:
    optimizer = model.inner_optimizer
    lr = getattr(optimizer, "lr", None)
    if lr is None:
        raise ValueError(f"inner_optimizer {type(optimizer).__name__} has no lr: give --lr, that of the inner SGD.")
    plain = isinstance(optimizer, SGLD) or (isinstance(optimizer, SGD) and not optimizer.momentum)
    if not plain:
        say(f"the expansion is of plain inner SGD: it is analysed with the lr of {type(optimizer).__name__}, {lr}.")
    return float(lr)


def _keep(report: Report, out: Path, origin: dict[str, Any]) -> None:
    """Print the tables, and write JSON and figure."""
    plain = asdict(report)
    for part in ("terms", "limit"):
        terms = getattr(report, part)
        plain[part] = terms._asdict() | {"rules": {name: c._asdict() for name, c in terms.rules.items()}}
    plain = json.loads(json.dumps(origin | plain), parse_constant=lambda _: None)  # strict JSON has no NaN
    write_text(out / "analysis.json", json.dumps(plain, indent=2, allow_nan=False) + "\n", keep=True)
    draw_taylor(out / "taylor.png", report.alphas, report.residuals, report.slopes)
    _print(report)
    tell(f"The analysis is in {out / 'analysis.json'} and {out / 'taylor.png'}.")


def _print(report: Report) -> None:
    terms, console = report.terms, PlainConsole()
    console.print(
        f"{terms.tasks} tasks, {terms.batches} mini-batches each; ± is the 95 % interval over tasks. "
        "Outer gradients made of displacements are divided by the inner step size α."
    )
    console.print(
        f"‖AvgGrad‖ = {_text(terms.avg_grad)}   ‖AvgGradInner‖ = {_text(terms.avg_grad_inner)}   "
        f"cosine = {_text(terms.cosine)}"
    )
    console.print(_coefficient_table("AvgGrad", "avg_grad", report))
    console.print(_coefficient_table("-α AvgGradInner", "avg_grad_inner", report))
    console.print(_slope_table(report))


def _coefficient_table(title: str, field: str, report: Report) -> Table:
    table = Table(title=f"coefficient of {title}", min_width=60)
    table.add_column("rule", no_wrap=True)
    for column in ("theory", f"α = {report.limit.lr:.1e}", f"α = {report.terms.lr:.1e}"):
        table.add_column(column, justify="right")
    for name in report.slopes:
        theory = getattr(report.terms.rules[name], f"{field}_theory")
        fitted = [_text(_coefficient(part, name, field)) for part in (report.limit, report.terms)]
        table.add_row(name, "-" if theory is None else f"{theory:g}", *fitted)
    return table


def _slope_table(report: Report) -> Table:
    low, high = report.alphas[0], report.alphas[-1]
    table = Table(title=f"Taylor residual, α from {low:.1e} to {high:.1e}", min_width=60)
    table.add_column("rule", no_wrap=True)
    for column in ("slope (theory: 2)", f"unexplained at α = {report.terms.lr:.1e}"):
        table.add_column(column, justify="right")
    for name, slope in report.slopes.items():
        table.add_row(name, f"{slope:.3f}", f"{100 * report.terms.rules[name].unexplained.value:.2f} %")
    return table


def _coefficient(terms: Terms, rule: str, field: str) -> Estimate:
    coefficients: Coefficients = terms.rules[rule]
    return getattr(coefficients, field)  # type: ignore[no-any-return]


def _text(estimate: Estimate) -> str:
    return f"{estimate.value:.4g} ± {estimate.ci95:.2g}"
