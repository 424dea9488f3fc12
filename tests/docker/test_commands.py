from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from fomal.cli import main
from tests.docker.files import FOLDER, compose, kubernetes

Run = tuple[list[str], int]
STUBS = {  # what a batch script calls, leaving a record of it
    "srun": 'printf "%s\\n" "$@" > srun; exit "$CODE"',
    "squeue": 'echo "$STATE"',
    "scontrol": 'printf "%s\\n" "$@" > scontrol',
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What `fomal VERB ...` would run with, in a folder without runs."""

    def parse(command: list[str]) -> dict[str, Any]:
        assert command[0] == "fomal"
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            main([*command[1:], "--print_config"])
        printed = capsys.readouterr()
        assert stop.value.code == 0, printed.err
        found = dict(yaml.safe_load(printed.out))
        found["trainer"]["devices"] = int(found["trainer"]["devices"])  # "2" is 2 for Lightning, too
        return found

    return parse


def checkpoint_of(config: dict[str, Any]) -> str:
    logger = config["trainer"]["logger"]["init_args"]
    return f"{logger['save_dir']}/{logger['name']}/{logger['version']}/checkpoints/last.ckpt"


def torchrun(args: list[str]) -> tuple[Any, list[str]]:
    """The options of torchrun, and the command that it starts."""
    options = get_args_parser().parse_args(args)
    assert options.no_python
    return options, [options.training_script, *options.training_script_args]


# -- Compose


@pytest.mark.parametrize(
    "gpus",
    [
        {},
        {"FOMAL_GPUS": "4", "FOMAL_OPTIONS": "--data.meta_batch_size=8 --seed_everything=1"},
        {"FOMAL_GPUS": "5", "FOMAL_CONFIG": "glyphs/5way_1shot_reptile", "FOMAL_RUN": "b"},
    ],
)
def test_compose_trains_and_tests_the_same_run_on_the_gpus_it_reserves(gpus: dict[str, str], config: Any) -> None:
    services = compose(**gpus)["services"]
    assert services["fit"]["entrypoint"] == ["torchrun"]
    options, command = torchrun(services["fit"]["command"])
    [device] = services["fit"]["deploy"]["resources"]["reservations"]["devices"]
    fit = config(command)
    assert options.standalone
    assert int(options.nproc_per_node) == fit["trainer"]["devices"] == device["count"]
    assert fit["data"]["init_args"]["meta_batch_size"] % fit["trainer"]["devices"] == 0
    assert fit["trainer"]["strategy"] == "ddp"
    assert "--ckpt_path=last" in command
    verb, checkpoint, *rest = services["test"]["command"]
    assert (verb, checkpoint) == ("test", f"--ckpt_path={checkpoint_of(fit)}")
    assert config(["fomal", "test", "--config=sinusoid/reptile", *rest])["trainer"]["devices"] == 1


# -- Kubernetes


def test_kubernetes_job_starts_as_many_processes_as_lightning_counts_on(config: Any) -> None:
    job = kubernetes()["Job"]
    [container] = job["spec"]["template"]["spec"]["containers"]
    shell, option = [*container["command"], *container["args"][:1]][:2]
    assert (shell, option, container["args"][1]) == ("sh", "-c", "torchrun")
    options, command = torchrun(container["args"][2:])
    trainer = config(command)["trainer"]
    assert int(options.nnodes) == trainer["num_nodes"] == job["spec"]["completions"]
    assert int(options.nproc_per_node) == trainer["devices"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert config(command)["data"]["init_args"]["meta_batch_size"] % (trainer["num_nodes"] * trainer["devices"]) == 0
    assert trainer["strategy"] == "ddp"
    assert "--ckpt_path=last" in command
    assert trainer["logger"]["init_args"]["version"]  # a restarted pod finds the folder
    assert "$(POD_IP)" in options.local_addr
    assert "POD_IP" in [variable["name"] for variable in container["env"]]


def test_first_pod_holds_the_store_at_the_services_port(tmp_path: Path) -> None:
    resources = kubernetes()
    [container] = resources["Job"]["spec"]["template"]["spec"]["containers"]
    options, _ = torchrun(container["args"][2:])
    name = resources["Job"]["metadata"]["name"]
    [port] = resources["Service"]["spec"]["ports"]
    assert options.rdzv_endpoint == f"{name}-0.{resources['Service']['metadata']['name']}:{port['port']}"
    stub(tmp_path, "torchrun", 'echo "$1 $#"')
    for index, is_host in [("0", "1"), ("1", "0"), ("10", "0")]:
        done = run([*container["command"], *container["args"]], tmp_path, JOB_COMPLETION_INDEX=index)
        assert done.stdout == f"--rdzv-conf=is_host={is_host} {len(container['args']) - 1}\n"


# -- SLURM


def stub(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"} | variables
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def batch(folder: Path, *args: str, code: int = 0, state: str = "RUNNING", nodes: int = 2, tasks: int = 1) -> Run:
    """Run the batch script with stubs for SLURM's commands: what it gave to srun, and its exit code."""
    for name, script in STUBS.items():
        stub(folder, name, script.replace(f"> {name}", f"> {folder}/{name}.record"))
    slurm = {"JOB_ID": "17", "NNODES": nodes, "NTASKS_PER_NODE": tasks, "CPUS_PER_TASK": 1}
    variables = {f"SLURM_{name}": str(value) for name, value in slurm.items()} | {"CODE": str(code), "STATE": state}
    done = run(["bash", str(FOLDER / "slurm.sbatch"), *args], folder, **variables)
    assert done.stderr == ""
    return (folder / "srun.record").read_text().splitlines(), done.returncode


def test_batch_script_starts_as_many_processes_as_lightning_counts_on(tmp_path: Path, config: Any) -> None:
    for args, nodes, tasks in [((), 2, 1), (("--config", "omniglot/5way_1shot_reptile"), 1, 5)]:
        command, code = batch(tmp_path, *args, nodes=nodes, tasks=tasks)
        settings = config(command[command.index("fomal") :])
        trainer = settings["trainer"]
        assert code == 0
        assert (trainer["num_nodes"], trainer["devices"], trainer["strategy"]) == (nodes, tasks, "ddp")
        assert trainer["logger"]["init_args"]["version"] == "job_17"  # the number stays when the job is requeued
        assert settings["data"]["init_args"]["meta_batch_size"] % (nodes * tasks) == 0
        assert command[command.index("--ckpt_path") + 1] == "last"


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (143, "RUNNING", True),
        (143, "COMPLETING", False),  # fomal requeued the job, or somebody cancelled it
        (143, "", False),
        (0, "RUNNING", False),
        (1, "RUNNING", False),
    ],
)
def test_batch_script_requeues_a_job_that_saved_and_was_not_requeued(
    code: int, state: str, requeued: bool, tmp_path: Path
) -> None:
    assert batch(tmp_path, code=code, state=state)[1] == code
    record = tmp_path / "scontrol.record"
    assert record.is_file() == requeued
    if requeued:
        assert record.read_text().splitlines() == ["requeue", "17"]


def test_batch_script_asks_for_the_signal_and_for_requeues() -> None:
    directives = re.findall(r"^#SBATCH --(.*)$", (FOLDER / "slurm.sbatch").read_text(), re.MULTILINE)
    assert {"requeue", "open-mode=append", "nodes=2"} <= {*directives}
    [sign] = [directive for directive in directives if directive.startswith("signal")]
    assert re.fullmatch(r"signal=USR1@\d{2,}", sign)  # without B: to the processes, not to the script


# -- README


def readme_commands() -> list[str]:
    text = (FOLDER / "README.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line[:1] not in ("", "#")]


@pytest.mark.parametrize("line", [line for line in readme_commands() if re.search(r" fomal (fit|test) ", line)])
def test_commands_of_the_readme_name_options_that_there_are(line: str, config: Any) -> None:
    words = shlex.split(line[re.search(r" fomal (fit|test) ", line).start() :])
    where = words.index("--ckpt_path") if words[1] == "test" else None
    if where:  # there is no such checkpoint here
        words[where : where + 2] = ["--config", "omniglot/quick_5way_1shot_reptile"]
    words += [] if "--trainer.devices" in words else ["--trainer.devices", "1"]
    assert config(words)


def test_readme_names_files_that_there_are() -> None:
    for line in readme_commands():
        for name in re.findall(r"docker/[\w.-]+", line):
            assert (FOLDER.parent / name).is_file(), line
