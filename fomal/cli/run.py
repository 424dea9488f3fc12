"""The verbs that run a trainer: fit, validate, test and predict."""

from __future__ import annotations

import inspect
import signal
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import SUPPRESS, ArgumentError, Namespace
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from fomal.callbacks import (
    EpisodeGrid,
    ExitOnSigterm,
    LearningCurve,
    MetaProgressBar,
    PredictionsFile,
    ReplicaFiles,
    ResultsFile,
    SaveLast,
)
from fomal.callbacks.folder import is_trial, run_folder
from fomal.callbacks.replicas import replica_loggers
from fomal.cli import VERBS, checkpoint, links, resume
from fomal.cli.configs import DEFAULT, find_config
from fomal.cli.errors import UsageError
from fomal.cli.explain import explain, refuse_bases, what_was_raised
from fomal.cli.given import LARGEST_SEED, TRUST_HELP, Given, strings, take_trust, with_config_paths, with_files_read
from fomal.cli.help import HELP, HelpFormatter
from fomal.cli.start import Start
from fomal.learner.build import (
    SEED,
    VARIED,
    add_arguments,
    build_own,
    check_network,
    close,
    replica_configs,
    stream_seed,
)
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.preflight import check_epochs, check_outer_step, check_precision
from fomal.learner.replicas import Replicas
from fomal.learner.settings import GROUPS
from fomal.run.checkpoints import meta_iterations
from fomal.run.moved import refusal
from fomal.run.trust import Trust
from fomal.tasks.datamodule import EpisodeDataModule
from fomal.tasks.replicated import ReplicatedDataModule
from fomal.utils.checks import countable
from fomal.utils.files import atomic_replace, check_path, keep_earlier
from fomal.utils.output import say, tell
from fomal.utils.processes import in_company, launched_processes, meet_first
from fomal.utils.terminal import calm_lightning

# Arguments of the trainer's methods that are not the user's: tables are printed by `ResultsFile`, and
# predictions written by `PredictionsFile`.
_OURS = {"verbose": False, "weights_only": True, "return_predictions": False}
_PRINT_FLAGS = {"skip_default": "skip_default", "skip_unset": "skip_unset", "comments": "with_comments"}


def run(verb: str, args: Sequence[str]) -> FomalCLI:
    """Parse `args`, build everything, and run `verb`."""
    return run_cli(FomalCLI, verb, args)


def run_cli(cli: type[FomalCLI], verb: str, args: Sequence[str]) -> FomalCLI:
    """Parse, build and run with a command line of the given class."""
    with warnings.catch_warnings():
        calm_lightning()
        handler = signal.getsignal(signal.SIGINT)
        try:
            with in_company():
                return cli(verb, args)
        except SystemExit as stop:
            # The trainer turns Ctrl-C into exit code 1, and leaves it ignored.
            if isinstance(stop.__context__, KeyboardInterrupt):
                signal.signal(signal.SIGINT, handler)
                raise stop.__context__ from None
            raise


def default_callbacks(trainer: dict[str, Any]) -> list[Callback]:
    """The callbacks of every run from the command line, unless its config has one of the same class.

    Args:
        trainer: the trainer's settings; they can turn the progress bar and checkpoints off.
    """
    chosen: list[Callback] = [ReplicaFiles(), ResultsFile(), PredictionsFile(), LearningCurve(), EpisodeGrid()]
    chosen.append(ExitOnSigterm())
    if trainer.get("enable_checkpointing") is not False:
        chosen.append(SaveLast())
    configured = trainer.get("callbacks") or []
    configured = configured if isinstance(configured, list) else [configured]
    if trainer.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in configured):
        chosen.insert(0, MetaProgressBar())  # it frees the terminal before tables are printed
    return [callback for callback in chosen if not any(isinstance(other, type(callback)) for other in configured)]


def trainer_defaults(verb: str) -> dict[str, Any]:
    """Trainer settings that differ from Lightning's: training counts meta-iterations, not epochs."""
    csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": ""}}
    return {
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 1000,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 50,
        "inference_mode": False,
        "enable_model_summary": False,
        "logger": csv if verb == "fit" else False,
    }


def _learner(config: dict[str, Any]) -> MetaLearner:
    """The learner of a run alone."""
    L.seed_everything(config["seed_everything"], workers=True, verbose=False)
    learner, _ = build_own(config)
    learner.config = config
    return learner


class SaveConfig(SaveConfigCallback):
    """Saves the configuration of a training run as `config.yaml` in its folder, and keeps an earlier one.

    Attributes:
        start: what to undo where the run fails before its first batch is done; None afterwards.
    """

    start: Start | None = None

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """From here on the run leaves what it has."""
        self.start = None

    on_test_batch_end = on_predict_batch_end = on_train_batch_end

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Likewise, but for the validation with which training may begin."""
        if not trainer.sanity_checking:
            self.start = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save, before the first step."""
        if stage != "fit":
            return
        path = run_folder(trainer) / self.config_filename  # in every process: it broadcasts
        if trainer.is_global_zero:
            if self.start is not None:
                self.start.claim(path.parent)
            with atomic_replace(path, keep=True) as unfinished:
                self.parser.save(self.config, unfinished, skip_unset=False, overwrite=True, multifile=False)
            for logger in trainer.loggers:
                logger.log_hyperparams(getattr(pl_module, "config", {}))


class FomalCLI(LightningCLI):
    """Lightning's command line around a `MetaLearner` and an `EpisodeDataModule`, for one verb.

    Args:
        verb: fit, validate, test or predict.
        args: the command line after the verb.
    """

    trainer_type: type[L.Trainer] = L.Trainer

    def __init__(self, verb: str, args: Sequence[str]) -> None:
        self.verb = verb
        super().__init__(
            MetaLearner,
            EpisodeDataModule,
            save_config_callback=SaveConfig,
            trainer_class=self.trainer_type,
            trainer_defaults=trainer_defaults(verb),
            seed_everything_default=0,
            parser_kwargs={
                "prog": "fomal",
                "exit_on_error": False,
                "allow_abbrev": False,
                "formatter_class": HelpFormatter,
                verb: {"exit_on_error": False, "usage": f"fomal {verb} [--config FILE_OR_NAME] [--KEY VALUE ...]"},
            },
            subclass_mode_data=True,
            args=[verb, *args],
            auto_configure_optimizers=False,
        )

    # -- parsing

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # a static method there
        """The one verb that runs; parsers for the others would cost time."""
        return {self.verb: LightningCLI.subcommands()[self.verb] | _OURS.keys()}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add fomal's own options first: they are what `--help` is asked for."""
        add_arguments(parser)
        parser.add_argument(
            "--replicas",
            type=int | list[dict[str, Any]] | None,
            default=None,
            help="run so many seeds side by side, from seed_everything on; or a list with the settings of each, from "
            f"{', '.join(VARIED)}",
        )
        parser.add_argument("--trust", default=SUPPRESS, metavar="NAME", help=TRUST_HELP)  # is taken before parsing
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{k}": v for k, v in self.trainer_defaults.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and refuse contradictions between what was given, what is linked, and the checkpoint."""
        self._say_what_it_does()
        rest = list(args[1:])
        if any(arg in ("-h", "--help") or arg.partition("=")[0].endswith(".help") for arg in rest):
            self._parse(rest)  # prints and exits
        rest, trusted = take_trust(rest)
        prints = [arg for arg in rest if arg.partition("=")[0] == "--print_config"]
        rest = with_config_paths([arg for arg in rest if arg not in prints])
        given = Given(rest)
        if moved := refusal(given.values):
            raise UsageError(f"{moved}.")
        self.config = self._parse_with_checkpoint(rest, given, Trust(trusted, set(strings(given.values))))
        links.refuse_contradictions(self.config[self.verb], given)
        if not isinstance(seed := self.config[self.verb]["seed_everything"], bool):
            countable(LARGEST_SEED, seed_everything=seed)
        if prints:
            self._print_config(prints[-1].partition("=")[2])

    def _say_what_it_does(self) -> None:
        """Put fomal's help in the place of what Lightning says of the trainer's method."""
        parser = self._parser(self.verb)
        lightnings, parser.description = parser.description, VERBS[self.verb].summary.capitalize() + "."
        for group in parser._action_groups:
            if group.title and group.title.rstrip(":").startswith(str(lightnings).rstrip(".:")[:20]):
                group.title = f"options of {self.verb}"
        for action in parser._actions:
            if action.dest in HELP:
                action.help = HELP[action.dest]

    def _parse_with_checkpoint(self, rest: list[str], given: Given, trust: Trust) -> Namespace:
        """Parse on top of the checkpoint's configuration, or of the default config."""
        ckpt_path = given.values.get("ckpt_path")
        if ckpt_path is not None:
            check_path("--ckpt_path", str(ckpt_path))
        if ckpt_path == resume.LAST_KEYWORD:
            ckpt_path = self._find_last(rest, given)
            rest = [*rest, f"--ckpt_path={ckpt_path or 'null'}"]
        elif ckpt_path is not None and Path(str(ckpt_path)).is_dir():
            ckpt_path = checkpoint.in_folder(str(ckpt_path))
            rest = [*rest, f"--ckpt_path={ckpt_path}"]
        base: list[str] = []
        if ckpt_path is not None and not checkpoint.is_keyword(str(ckpt_path)):
            saved, content = checkpoint.checkpoint_config(str(ckpt_path), self.verb, trust)
            base = ["--config", yaml.safe_dump(saved)] if saved else []
        if base:
            close(self._parser(self.verb))
            try:
                alone = self._parse(base)
                trust.check_classes(alone[self.verb], str(ckpt_path))
            except (UsageError, ValueError) as error:
                raise UsageError(f"the configuration in {ckpt_path} cannot be used: {error}") from error
            check_network(alone[self.verb]["model"]["network"], content, f"ckpt_path={ckpt_path}")
            config = self._parse([*base, *with_files_read(rest)])
            links.follow_data(config[self.verb], Given([*base, *rest]))
            before, asked = (trust.cleaned(self._plain(part), "the configuration") for part in (alone, config))
            checkpoint.refuse_differences(before, asked, self.verb)
            if self.verb == "fit":
                resume.go_on_in_its_folder(config[self.verb]["trainer"], Path(str(ckpt_path)))
            return config
        if not given.has_config:
            if ckpt_path is not None:
                raise UsageError(f"--ckpt_path {ckpt_path} brings no configuration with it: give --config FILE too.")
            if self.verb != "fit":
                raise UsageError(f"give --ckpt_path FILE to {self.verb} a trained network, or --config for a new one.")
            base = ["--config", find_config(DEFAULT)]
            say(f"no --config given: using {base[1]}")
        elif self.verb != "fit" and ckpt_path is None:
            say("no --ckpt_path given: the network is as it is before training.")
        config = self._parse([*base, *rest])
        links.follow_data(config[self.verb], given)
        return config

    def _find_last(self, rest: list[str], given: Given) -> Path | None:
        """The newest checkpoint of the run that is asked for; None to begin anew."""
        base = [] if given.has_config else ["--config", find_config(DEFAULT)]
        config = self._parse([*base, *rest])
        found, problems = resume.find_last(config[self.verb]["trainer"])
        for problem in problems:
            say(f"{problem}: {'using the one before' if found else 'there is no other'}.")
        if found:
            say(f"going on from {found}.")
            return found
        if problems or self.verb != "fit":
            raise UsageError("--ckpt_path last: no checkpoint of this run can be used; leave it out to begin anew.")
        say("no checkpoint of this run yet: it begins anew.")
        return None

    def _parse(self, rest: list[str]) -> Namespace:
        try:
            parsed: Namespace = self.parser.parse_args([self.verb, *rest])
        except ArgumentError as error:
            raise UsageError(explain(str(error), self._parser(self.verb))) from error
        for name, default in GROUPS.items():
            if not isinstance(value := parsed[self.verb]["model"].get(name), Namespace):
                names = ", ".join(field.name for field in fields(default))
                raise UsageError(f"model.{name}={'null' if value is None else value} must be a mapping of {names}.")
        refuse_bases(parsed[self.verb])
        return parsed

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let the checkpoint override the command line without a word."""

    def _plain(self, config: Namespace) -> dict[str, Any]:
        """The configuration in plain values, without what is linked."""
        text = self._parser(self.verb).dump(config[self.verb], skip_unset=False, format="yaml")
        return dict(yaml.safe_load(text))

    def _print_config(self, flags: str) -> None:
        chosen = [flag for flag in flags.split(",") if flag]
        for flag in chosen:
            if flag not in _PRINT_FLAGS:
                raise UsageError(f"--print_config={flag} is unknown: use {', '.join(_PRINT_FLAGS)}.")
        # Without a flag null is printed too: leaving it out would bring the default back.
        how = {"skip_unset": False} | {_PRINT_FLAGS[flag]: True for flag in chosen}
        print(self._parser(self.verb).dump(self.config[self.verb], **how), end="")
        raise SystemExit(0)

    # -- building and running

    def before_instantiate_classes(self) -> None:
        """Refuse 16-bit floating point, place the run, and put a seed chosen at random where no link could know it."""
        check_precision(self.config[self.verb]["trainer"].get("precision"))  # on a CPU Lightning would change it
        self._place_run(self.config[self.verb]["trainer"])
        config, (source, target) = self.config[self.verb], SEED
        if target in config:
            config[target] = stream_seed(config[source])

    def _place_run(self, trainer: Namespace) -> None:
        """Let `default_root_dir` place the run where no logger does; say so where one does."""
        root, logger = trainer.get("default_root_dir"), trainer.get("logger")
        if not root or not logger or isinstance(logger, bool):
            return
        for one in logger if isinstance(logger, list) else [logger]:
            place = one.get("init_args", {}).get("save_dir")
            if place and not Path(place).resolve().is_relative_to(Path(root).resolve()):
                say(
                    f"the run is in {place}, as trainer.logger says, and not in trainer.default_root_dir={root}: "
                    f"use --trainer.logger.init_args.save_dir {root} to change that."
                )

    def instantiate_classes(self) -> None:
        """Build everything; raise what a constructor raised, not jsonargparse's account of all it tried."""
        with what_was_raised():
            super().instantiate_classes()

    def after_instantiate_classes(self) -> None:
        """Refuse a meta-batch that does not divide; tell the model its configuration, for checkpoints and results."""
        if self.verb == "fit":
            self.datamodule.check_processes(launched_processes()[1])  # before they look for each other
            check_outer_step(self.trainer)
            check_epochs(self.trainer)
        plain = self._plain(self.config)
        config = {key: plain[key] for key in ("seed_everything", "model", "data", "trainer")}
        if plain.get("replicas") is None:
            self.model.config = config
            return
        self._replicate(config, plain["replicas"])

    def _replicate(self, config: dict[str, Any], replicas: int | list[dict[str, Any]]) -> None:
        """Put replicas in the place of the run."""
        configs = replica_configs(config, replicas)
        self.model = Replicas([_learner(own) for own in configs])
        self.model.config = config | {"replicas": replicas}
        self.datamodule = ReplicatedDataModule(self.datamodule, [own["seed_everything"] for own in configs])
        # Processes that are started from here choose no other seed than this one.
        L.seed_everything(config["seed_everything"], workers=True, verbose=False)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> L.Trainer:
        trainer = super()._instantiate_trainer(config, [*callbacks, *default_callbacks(config)])
        meet_first(trainer.strategy)
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        accepted = inspect.signature(getattr(self.trainer, subcommand)).parameters
        ours = {name: value for name, value in _OURS.items() if name in accepted}
        return super()._prepare_subcommand_kwargs(subcommand) | ours

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; what fails before its first batch is done leaves no files."""
        saves = [part for part in self.trainer.callbacks if isinstance(part, SaveConfig)]  # type: ignore[attr-defined]
        if subcommand not in LightningCLI.subcommands():  # which has no log
            return super()._run_subcommand(subcommand)
        for part in saves:
            part.start = Start(self.trainer)
        try:
            self._keep_logs()
            super()._run_subcommand(subcommand)
        except BaseException:
            if saves and saves[0].start is not None and self.trainer.is_global_zero:
                saves[0].start.undo()
            raise

    def _keep_logs(self) -> None:
        """Keep the logs of earlier runs in the same folders, and go on with those of a resumed one."""
        if is_trial(self.trainer):
            return
        folder = run_folder(self.trainer)
        # CSVLogger deletes the log that is there when a run starts.
        warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
        if not self.trainer.is_global_zero:
            return
        fits, loggers = self.verb == "fit", list(self.trainer.loggers)
        if fits and isinstance(self.model, Replicas) and loggers:
            own = replica_loggers(folder, len(self.model.learners))
            loggers += own
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined] # set by a helper
                if isinstance(callback, ReplicaFiles):
                    callback.loggers = own
        logs: dict[Path, CSVLogger | None] = {folder / "metrics.csv": None} if fits else {}
        logs |= {Path(one.log_dir) / "metrics.csv": one for one in loggers if isinstance(one, CSVLogger)}
        ckpt_path = self.config[self.verb].get("ckpt_path")
        goes_on = fits and ckpt_path and resume.is_of_run(Path(ckpt_path), folder)
        for log, logger in logs.items():
            if goes_on and logger is not None and log.is_file():
                resume.go_on_with_log(logger, log, meta_iterations(Path(ckpt_path)))
            else:
                keep_earlier(log)

    def after_fit(self) -> None:
        """Say where the run is."""
        if not is_trial(self.trainer):
            folder = run_folder(self.trainer)  # in every process: it broadcasts
            if self.trainer.is_global_zero:
                tell(f"The run is in {folder}.")
