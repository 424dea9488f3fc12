from __future__ import annotations

import re
from typing import Any

from tests.docker.files import FOLDER, ROOT, compose, dockerfile, import_tool, kubernetes

DOCKERFILE = (FOLDER / "Dockerfile").read_text()


# -- Dockerfile


def test_image_is_what_the_other_files_count_on() -> None:
    lines = dockerfile()
    final = lines[[i for i, line in enumerate(lines) if line.startswith("FROM")][-1] :]
    environment = dict(re.findall(r"(\w+)=(\S*)", " ".join(line for line in final if line.startswith("ENV"))))
    assert [line for line in lines if line.startswith("FROM")] == ["FROM ${BASE_IMAGE} AS wheel", "FROM ${BASE_IMAGE}"]
    assert 'ENTRYPOINT ["fomal"]' in final
    assert environment["FOMAL_COMMIT"] == "${FOMAL_COMMIT}"
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert not [name for name in environment if name.startswith("WANDB")]  # from the environment of the run alone
    assert [line for line in final if line.startswith("HEALTHCHECK")][0].endswith('CMD ["fomal", "--version"]')
    [volumes] = [line for line in final if line.startswith("VOLUME")]
    for mounts in (
        [mount["target"] for mount in compose()["services"]["fit"]["volumes"]],
        [mount["mountPath"] for mount in container(kubernetes())["volumeMounts"]],
    ):
        assert set(re.findall(r'"(.*?)"', volumes)) <= {*mounts}


def test_an_edit_of_the_source_leaves_the_dependencies_layer_alone() -> None:
    lines = dockerfile()
    first = next(i for i, line in enumerate(lines) if line == "FROM ${BASE_IMAGE}")
    install = next(i for i in range(first, len(lines)) if "source=docker/requirements.txt" in lines[i])
    wheel = next(i for i in range(first, len(lines)) if "from=wheel" in lines[i])
    commit = next(i for i in range(first, len(lines)) if lines[i].startswith("ARG FOMAL_COMMIT"))
    assert not [line for line in lines[first:install] if line.startswith(("COPY", "ADD", "ARG"))]
    assert install < wheel < commit


def test_build_context_has_what_is_copied_and_nothing_else() -> None:
    everything, *rest = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"]
    allowed = {line[1:] for line in rest if line.startswith("!")}
    copied = {part for line in dockerfile() if line.startswith("COPY") for part in line.split()[1:-1]}
    mounted = set(re.findall(r"source=(docker/\S+?),", DOCKERFILE))
    assert everything == "*"
    assert allowed == copied | {"docker/requirements*.txt"}
    assert mounted == {path.relative_to(ROOT).as_posix() for path in FOLDER.glob("requirements*.txt")}
    assert all((ROOT / path).exists() for path in copied)


# -- Compose


def test_compose_gives_containers_few_rights_and_the_gpus_asked_for() -> None:
    services = compose(FOMAL_GPUS="3", FOMAL_USER="7:8", FOMAL_COMMIT="abc")["services"]
    for name, count in [("fit", 3), ("test", 1)]:
        service = services[name]
        [device] = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["count"], device["capabilities"]) == (count, ["gpu"])
        assert (service["read_only"], service["init"], service["tmpfs"]) == (True, True, ["/tmp"])
        assert service["cap_drop"] == ["ALL"]
        assert service["user"] == "7:8"
        assert service["build"]["args"] == {"FOMAL_COMMIT": "abc"}
        assert (FOLDER / service["build"]["dockerfile"].removeprefix("docker/")).is_file()
        assert int(service["shm_size"]) >= 2**30
        assert service["environment"]["WANDB_API_KEY"] is None  # that of the shell
    assert seconds(services["fit"]["stop_grace_period"]) > int(
        services["fit"]["environment"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    )


def seconds(text: str) -> int:
    [(minutes, rest)] = re.findall(r"^(\d+)m(\d+)s$", text)
    return 60 * int(minutes) + int(rest)


# -- Kubernetes

QUANTITY = re.compile(r"\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?")  # as Kubernetes writes amounts
Resources = dict[str, dict[str, Any]]


def container(resources: Resources) -> dict[str, Any]:
    [one] = resources["Job"]["spec"]["template"]["spec"]["containers"]
    return dict(one)


def check_kubernetes(resources: Resources) -> None:
    """Raise for what the schema refuses, and for the values and names that it lets pass."""
    validator = import_tool("kubernetes_validate", "kubernetes-validate")
    for resource in resources.values():
        validator.validate(resource, validator.latest_version(), strict=True)
    job, service = resources["Job"]["spec"], resources["Service"]
    pod, main = job["template"]["spec"], container(resources)
    # fields with few values, which the schema takes for any text
    assert job["completionMode"] == "Indexed"
    assert job["podReplacementPolicy"] == "Failed"
    assert [rule["action"] for rule in job["podFailurePolicy"]["rules"]] == ["Ignore"]
    assert job["podFailurePolicy"]["rules"][0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert pod["restartPolicy"] == "Never"  # which a failure policy demands
    assert main["imagePullPolicy"] in ("Always", "IfNotPresent", "Never")
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert main["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert main["securityContext"]["readOnlyRootFilesystem"] is True
    # amounts
    amounts = [*main["resources"]["limits"].values(), *main["resources"]["requests"].values()]
    amounts += [
        volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if "sizeLimit" in volume.get("emptyDir", {})
    ]
    assert all(QUANTITY.fullmatch(str(amount)) for amount in amounts), amounts
    assert int(main["resources"]["limits"]["nvidia.com/gpu"]) >= 1
    # names that must agree
    name = resources["Job"]["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert service["spec"]["clusterIP"] == "None"
    assert service["metadata"]["name"] == pod["subdomain"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in main["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    [memory] = [name for name, volume in volumes.items() if volume.get("emptyDir", {}).get("medium") == "Memory"]
    assert mounts[memory] == "/dev/shm"
    # numbers that must agree
    environment = {variable["name"]: variable.get("value") for variable in main["env"]}
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert job["completions"] == job["parallelism"] > 1


def test_kubernetes_job_is_valid() -> None:
    check_kubernetes(kubernetes())


def test_pods_run_as_the_user_of_the_image() -> None:
    rights = kubernetes()["Job"]["spec"]["template"]["spec"]["securityContext"]
    assert rights["runAsNonRoot"] is True
    assert f"USER {rights['runAsUser']}:{rights['runAsGroup']}" in dockerfile()
