"""Files that somebody else made run nothing, fetch nothing and read no further file."""

from __future__ import annotations

import copy
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fomal
from fomal.adaptation import Adapted
from fomal.cli import main
from fomal.cli.checkpoint import without_places
from fomal.learner.build import build, build_network
from fomal.learner.meta_learner import MetaLearner
from fomal.models import Classifier, Conv4
from fomal.run.trust import Trust, is_known

SIZE = 8
WATCHED = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect")
VERBS = ("test", "validate", "predict", "analyze", "fit")
events: list[str] = []
watching: list[str] = []


def watch(event: str, args: tuple[Any, ...]) -> None:
    if watching and (event in WATCHED or (event == "open" and "canary" in str(args[0]))):
        events.append(f"{event} {args[:1]}")


sys.addaudithook(watch)


def of(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


NETWORK = of("fomal.models.Conv4", ways=3, in_channels=3, image_size=SIZE, filters=4)
CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "model": {
        "network": NETWORK,
        "rule": of("fomal.outer.Reptile"),
        "inner_optimizer": of("fomal.inner.SGD", lr=0.1),
        "eval": {"steps": 2},
        "outer": {},
    },
    "data": of("fomal.data.ImageFolderDataModule", root="nowhere", image_size=SIZE, ways=3),
    "trainer": {"max_steps": 1, "logger": False, "accelerator": "cpu"},
}
ADDRESS, FOLDER = "http://127.0.0.1:PORT/canary", "FOLDER"  # put in at the test
TOUCH = "touch FOLDER/canary"
FACTORY = "fomal.models.Classifier"

# Where in the configuration, what is put there, and the name that the message must tell how to trust, if it is one.
HOSTILE: dict[str, tuple[str, Any, str]] = {
    "network command": ("model.network", of("os.system", command=TOUCH), "os.system"),
    "network of the folder": ("model.network", of("evil_canary.Net"), "evil_canary.Net"),
    "network by re-export": ("model.network", of("torch.nn.modules.module.torch.hub.load"), "torch"),
    "network through os": ("model.network", of("torch.nn.os.system", command=TOUCH), "torch.nn.os.system"),
    "network from the hub": ("model.network", of("torch.hub.load", repo_or_dir="a/b"), "torch.hub.load"),
    "network by registry": ("model.network", of("torchvision.models.get_model"), "torchvision.models.get_model"),
    "network with pretrained backbone": (
        "model.network",
        of("torchvision.models.detection.fasterrcnn_resnet50_fpn"),
        "torchvision.models.detection.fasterrcnn_resnet50_fpn",
    ),
    "network by partial": ("model.network", of("functools.partial"), "functools.partial"),
    "network by name": ("model.network", "evil_canary.Net", ""),
    "network by short name": ("model.network", "ScriptModule", ""),
    "network as a file": ("model.network", "FOLDER/canary.yaml", ""),
    "network at an address": ("model.network", ADDRESS, ""),
    "network as text": ("model.network", '{"class_path": "evil_canary.Net"}', ""),
    "network with dotted keys": ("model", {"network.class_path": "evil_canary.Net"}, ""),
    "network beside its keys": ("model.network.__init__", "evil_canary.Net", ""),
    "module in a module": (
        "model.network",
        of("torch.nn.Sequential", args=[of("torch.nn.Linear"), of("evil_canary.Net")]),
        "evil_canary.Net",
    ),
    "factory command": ("model.network", of(FACTORY, factory="os.system", options={"command": TOUCH}), "os.system"),
    "factory by posix": ("model.network", of(FACTORY, factory="posix.system", options={"command": TOUCH}), "posix"),
    "factory process": (
        "model.network",
        of(FACTORY, factory="subprocess.run", options={"args": ["true"]}),
        "subprocess",
    ),
    "factory of the folder": ("model.network", of(FACTORY, factory="evil_canary.make"), "evil_canary.make"),
    "factory by re-export": (
        "model.network",
        of(FACTORY, factory="fomal.models.classifier.import_module", options={"name": "evil_canary"}),
        "fomal.models.classifier.import_module",
    ),
    "factory in a factory": (
        "model.network",
        of(FACTORY, factory=FACTORY, options={"factory": "os.system", "options": {"command": TOUCH}}),
        "os.system",
    ),
    "factory as a list": ("model.network", of(FACTORY, factory=["os.system"]), "os.system"),
    "timm from a file": (
        "model.network",
        of(
            FACTORY, factory="timm.create_model", options={"model_name": "resnet18", "checkpoint_path": "FOLDER/canary"}
        ),
        "",
    ),
    "timm from a folder": (
        "model.network",
        of(FACTORY, factory="timm.create_model", options={"model_name": "local-dir:FOLDER/canary"}),
        "",
    ),
    "timm from a hub": (
        "model.network",
        of(FACTORY, factory="timm.create_model", options={"model_name": "hf-hub:a/b"}),
        "",
    ),
    "timm with an address": (
        "model.network",
        of(FACTORY, factory="timm.create_model", options={"pretrained_cfg": {"url": ADDRESS}, "pretrained": True}),
        "",
    ),
    "options with a class": (
        "model.network",
        of(FACTORY, factory="torchvision.models.resnet18", options={"norm_layer": of("evil_canary.Net")}),
        "evil_canary.Net",
    ),
    "rule": ("model.rule", of("evil_canary.Rule"), "evil_canary.Rule"),
    "inner optimiser": ("model.inner_optimizer", of("evil_canary.Optimizer"), "evil_canary.Optimizer"),
    "inner steps": ("model.train", of("os.system", command=TOUCH), "os.system"),
    "execution": ("model.execution", "canary.yaml", ""),
    "outer optimiser": ("model.outer.optimizer", "os.system", "os.system"),
    "outer optimiser re-exported": ("model.outer.optimizer", of("torch.optim.lr_scheduler.partial"), "torch.optim"),
    "outer schedule": (
        "model.outer.schedule",
        of("torch.optim.lr_scheduler.LambdaLR", lr_lambda="os.system"),
        "os.system",
    ),
    "outer schedule at an address": ("model.outer.schedule", ADDRESS, ""),
    "data": ("data", of("evil_canary.Data"), "evil_canary.Data"),
    "data as a file": ("data", "FOLDER/canary.yaml", ""),
    "data at an address": ("data.init_args.root", ADDRESS, ""),
    "learn2learn's pickles": ("data", of("fomal.data.TasksetDataModule", benchmark="omniglot"), "fomal.data.Taskset"),
    "task set of a class": ("data.init_args.tasksets", {"train": of("evil_canary.Tasks")}, "evil_canary.Tasks"),
    "image transforms": ("data.init_args.image_transforms", [of("evil_canary.Net")], "evil_canary.Net"),
    "class transforms": (
        "data.init_args.class_transforms",
        [of("torchvision.transforms.v2.Lambda", lambd="os.system")],
        "os.system",
    ),
    "new classes": ("data.init_args.new_classes", ["evil_canary.Net"], "evil_canary.Net"),
    "new classes as text": ("data.init_args.new_classes", "[evil_canary.Net]", "evil_canary.Net"),
    "callback": ("trainer.callbacks", [of("evil_canary.Callback")], "evil_canary.Callback"),
    "callback of functions": (
        "trainer.callbacks",
        of("lightning.pytorch.callbacks.LambdaCallback", setup="os.system"),
        "os.system",
    ),
    "logger": ("trainer.logger", of("evil_canary.Logger"), "evil_canary.Logger"),
    "logger that uploads": ("trainer.logger", of("fomal.loggers.WandbLogger"), "fomal.loggers.WandbLogger"),
    "profiler": ("trainer.profiler", of("evil_canary.Profiler"), "evil_canary.Profiler"),
    "profiler at an address": ("trainer.profiler", ADDRESS, ""),
    "strategy": ("trainer.strategy", "evil_canary.Strategy", "evil_canary.Strategy"),
    "plugins": ("trainer.plugins", ["evil_canary.Plugin"], "evil_canary.Plugin"),
    "accelerator": ("trainer.accelerator", of("evil_canary.Accelerator"), "evil_canary.Accelerator"),
    "replicas": ("replicas", [{"model.network.class_path": "evil_canary.Net"}], "evil_canary.Net"),
    "anchors": (
        "model.adapt",
        "[&a [x,x,x], " + ", ".join(f"&b{i} [*a,*a]" for i in range(4)) + ", evil_canary.x]",
        "",
    ),
}


@pytest.fixture
def canaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Any]]:
    """A folder with a module and files that nobody may touch, a server that nobody may ask; fills both in a value."""

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            events.append(f"GET {self.path}")
            self.send_response(200)
            self.end_headers()

        do_HEAD = do_GET

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    (tmp_path / "evil_canary.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    (tmp_path / "canary.yaml").write_text(json.dumps(NETWORK))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def fill(value: Any) -> Any:
        text = json.dumps(value).replace("FOLDER", str(tmp_path)).replace("PORT", str(server.server_port))
        return json.loads(text)

    events.clear()
    watching.append("now")
    yield fill
    watching.clear()
    server.shutdown()
    server.server_close()
    assert not events
    assert not (tmp_path / "canary").exists()
    assert "evil_canary" not in sys.modules


def changed(config: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    *sections, last = where.split(".")
    inside = config
    for section in sections:
        inside = inside[section]
    inside[last] = value
    return config


def write(path: Path, config: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    weights = Conv4(**NETWORK["init_args"]).state_dict()
    own = {"config": config, "carried": None, "max_steps": 1, "skipped_tasks": 0, "versions": {}, "commits": {}}
    state = {f"network.{name}": t for name, t in weights.items()}
    whole = {"state_dict": state, "global_step": 1, "epoch": 0, "pytorch-lightning_version": "2.6.6"}
    torch.save(whole | {"fomal": own}, path)
    return path


@pytest.mark.parametrize(("number", "case"), enumerate(HOSTILE))
def test_no_checkpoint_reaches_anything(
    number: int, case: str, tmp_path: Path, canaries: Callable[[Any], Any], fails: Callable[..., str]
) -> None:
    where, value, name = HOSTILE[case]
    path = write(tmp_path / "c.ckpt", changed(CONFIG, where, canaries(value)))
    message = fails(VERBS[number % len(VERBS)], "--ckpt_path", str(path))
    assert "c.ckpt" in message
    assert f"--trust {name}" in message or not name
    if where.startswith(("model", "data")):
        with pytest.raises(ValueError, match=r"c\.ckpt|configuration"):
            fomal.adapt(path, torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), ["a", "b"])
        with pytest.raises(ValueError, match=r"c\.ckpt|configuration"):
            MetaLearner.load_from_checkpoint(path)
        if number % 8 == 0:
            assert "c.ckpt" in fails("adapt", "--ckpt_path", str(path), "--support", ".", "--out", "m", code=1)


@pytest.mark.parametrize(
    ("number", "case"), enumerate(case for case, (where, _, _) in HOSTILE.items() if where == "model.network")
)
def test_no_model_folder_reaches_anything(
    number: int, case: str, tmp_path: Path, canaries: Callable[[Any], Any], fails: Callable[..., str]
) -> None:
    _, value, name = HOSTILE[case]
    folder = tmp_path / "model"
    folder.mkdir()
    form = {"height": SIZE, "width": SIZE, "color": "rgb"}
    about = {"format": 1, "classes": ["a", "b", "c"], "ways": 3, "image_format": form, "network": canaries(value)}
    (folder / "model.json").write_text(json.dumps(about))
    save_file(Conv4(**NETWORK["init_args"]).state_dict(), folder / "model.safetensors")
    images = torch.zeros(3, 3, SIZE, SIZE, dtype=torch.uint8)
    save_file({"images": images, "labels": torch.arange(3)}, folder / "support.safetensors")
    with pytest.raises(ValueError, match=r"model\.json|model cannot be used") as raised:
        Adapted.load(folder)
    assert f"--trust {name}" in str(raised.value) or not name or isinstance(value, str)
    if number % 8:
        return
    assert "model" in fails("classify", "--adapted", str(folder), "--images", "x.png", "--out", "t.csv", code=1)
    assert "model" in fails("export", "--adapted", str(folder), "--format", "onnx", code=1)


def test_what_the_user_trusts_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_nets.py").write_text(
        "import os\nfrom os import system\nfrom fomal.models import Conv4\nclass Net(Conv4): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = {"class_path": "own_nets.Net", "init_args": NETWORK["init_args"]}
    with pytest.raises(ValueError, match=r"trust it, add --trust own_nets\.Net \(in Python trust=\['own_nets.Net'\]"):
        build_network(config)
    assert "own_nets" not in sys.modules
    for trust in (["own_nets.Net"], ["own_nets"]):
        assert type(build_network(config, trust)).__name__ == "Net"
    for name in ("own_nets.os.system", "own_nets.system"):
        assert not Trust(["own_nets"]).has(name)
    assert not Trust(own=["own_nets"]).has("own_nets.Net")
    with pytest.raises(ValueError, match="trust='a b' is no import path"):
        Trust(["a b"])


def test_weights_and_downloads_are_left_out() -> None:
    network = of(FACTORY, factory="torchvision.models.resnet18", options={"weights": "DEFAULT", "num_classes": 7})
    data = of("fomal.data.OmniglotDataModule", download=True, cache_dir="/nowhere", root="r")
    checked = Trust().check({"model": {"network": network}, "data": data}, "file")
    assert checked["model"]["network"]["init_args"]["options"] == {"num_classes": 7}
    assert checked["data"]["init_args"] == {"root": "r"}
    assert network["init_args"]["options"]["weights"] == "DEFAULT"  # what was given stays


def test_a_file_does_not_choose_where_is_written(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "x" / "version_3" / "checkpoints" / "last.ckpt"
    csv = of("lightning.pytorch.loggers.CSVLogger", save_dir=str(tmp_path / "runs"), name="x", version="version_3")
    save = of("fomal.callbacks.SaveLast", dirpath=str(path.parent))
    own = {"logger": csv, "callbacks": [save], "default_root_dir": None}
    assert without_places(own, path) == own
    csv, save = copy.deepcopy(csv), of("fomal.callbacks.SaveLast", dirpath="/etc")
    csv["init_args"] |= {"save_dir": "/etc", "version": "../../x"}
    left = without_places({"logger": csv, "callbacks": [save], "default_root_dir": "/etc"}, path)
    assert left == {
        "logger": of("lightning.pytorch.loggers.CSVLogger", save_dir="runs", name=""),
        "callbacks": [of("fomal.callbacks.SaveLast")],
    }


def test_known_names_are_of_their_kind() -> None:
    known = ("torch.nn.Linear", "torch.optim.AdamW", "torch.optim.lr_scheduler.CosineAnnealingLR", "timm.create_model")
    known += ("torchvision.models.resnet18", "torchvision.transforms.v2.Resize", "fomal.models.conv4.Conv4")
    known += ("fomal.data.OmniglotDataModule", "fomal.callbacks.SaveLast", "lightning.pytorch.loggers.CSVLogger")
    assert [name for name in known if not is_known(name)] == []
    unknown = ("torch.nn", "torch.nn.functional.relu", "torch.nn.Module.load_state_dict")
    unknown += ("fomal.learner.meta_learner.MetaLearner", "fomal.learner.MetaLearner", "fomal.MetaLearner")
    unknown += ("torch.optim.Optimizer.__init__", "fomal.models.find_head", "torchvision.models.list_models", "Conv4")
    unknown += ("fomal.data.taskset.TasksetDataModule", "torch.nn.no_such_thing", "lightning.pytorch.cli.LightningCLI")
    assert [name for name in unknown if is_known(name)] == []


def test_configurations_that_fomal_writes_are_trusted() -> None:
    learner, _ = build(CONFIG)
    assert isinstance(learner.network, Conv4)


@pytest.mark.parametrize("factory", ["os.system", "posix.system", "subprocess.run", "builtins.eval", "torch.hub.load"])
def test_no_factory_is_called_that_makes_no_network(factory: str) -> None:
    with pytest.raises(ValueError, match="is not called"):
        Classifier(factory, options={})


def test_the_users_own_configuration_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    (tmp_path / "my_nets.py").write_text("from fomal.models import MLP\nclass Net(MLP): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    short = [
        "--trainer.max_steps=2",
        "--data.test_tasks=4",
        "--data.val_tasks=4",
        "--trainer.enable_progress_bar=false",
    ]
    own = ["--model.network=my_nets.Net", "--model.rule=fomal.outer.Reptile"]
    main(["fit", "--config", "sinusoid/reptile", *own, *short])
    (path,) = tmp_path.rglob("last.ckpt")
    assert "add --trust my_nets.Net" in fails("test", "--ckpt_path", str(path))
    assert main(["test", "--ckpt_path", str(path), "--trust", "my_nets.Net", "--data.test_tasks=4"]) is not None
    resumed = ["fit", "--config", "sinusoid/reptile", *own, *short, "--ckpt_path", "last"]
    assert type(main(resumed).model.network).__name__ == "Net"


@pytest.mark.parametrize("state", [{"best_k_models": {"runs/../../precious": 1.0}}, {"last_model_path": "../precious"}])
def test_a_callbacks_state_does_not_choose_what_is_deleted(state: dict[str, Any]) -> None:
    learner, _ = build(CONFIG)
    with pytest.raises(ValueError, match="precious, outside of its folder"):
        learner.on_load_checkpoint({"callbacks": {"ModelCheckpoint": state}, "fomal": {"carried": None}})


def test_a_learner_of_ones_own_lends_no_trust_to_the_file(tmp_path: Path, canaries: Callable[[Any], Any]) -> None:
    """The file's names go into the model's folder, and are checked when that is loaded."""
    learner, data = build(CONFIG)
    evil = of("evil_canary.Net")
    path = write(tmp_path / "c.ckpt", changed(CONFIG, "model.network", evil))
    images = torch.randint(0, 255, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    form = data.image_format  # type: ignore[attr-defined]
    adapted = fomal.adapt(path, images, ["a", "b", "c"], learner=learner, image_format=form)
    assert adapted.about["network"]["class_path"] == "evil_canary.Net"
