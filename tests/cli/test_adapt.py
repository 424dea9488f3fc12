"""The verbs adapt, classify and export, as a user has them."""

from __future__ import annotations

import csv
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fomal.adaptation import Adapted, Predictions
from fomal.cli import main
from fomal.cli.classify import _print_accuracy, wilson
from fomal.data.images.manifest import by_labels
from fomal.data.images.source import open_source

Fails = Callable[..., str]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_adapt_writes_a_model_and_says_what_it_did(
    checkpoint: Path, support: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["adapt", "--ckpt_path", str(checkpoint), "--support", str(support), "--out", str(tmp_path / "m")]
    adapted = main([*arguments, "--steps", "3", "--optimizer", "SGD", "--optimizer.lr=0.01"])
    said = capsys.readouterr().out
    assert "Adapted to 3 classes with 9 images: new21 4, new20 3, new22 2." in said
    assert "3 steps of 4 images, so each was seen 1.3 times; the loss of a mini-batch went from " in said
    assert "That is little: --steps 23 would make it 10." in said  # 9 images, 4 a step
    assert f"fomal classify --adapted {tmp_path / 'm'} --images DIR" in said
    assert adapted.about["adaptation"]["optimizer"] == "fomal.inner.sgd.SGD"
    assert Adapted.load(tmp_path / "m").classes == ["new20", "new21", "new22"]


def test_archives_serve_as_well(checkpoint: Path, support: Path, model: Path, queries: Path, tmp_path: Path) -> None:
    archive, packed = tmp_path / "support.zip", tmp_path / "queries.tgz"
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted(support.rglob("*.png")):
            out.write(path, Path("all") / path.relative_to(support))
    main(["adapt", "--ckpt_path", str(checkpoint), "--support", str(archive), "--out", str(tmp_path / "m")])
    zipped, plain = Adapted.load(tmp_path / "m"), Adapted.load(model)
    assert torch.equal(zipped.support, plain.support)
    assert torch.equal(zipped.network.head.weight, plain.network.head.weight)
    with tarfile.open(packed, "w:gz") as out:
        out.add(queries, ".")
    tables = []
    for images in (queries, packed):
        tables.append(tmp_path / f"{images.name}.csv")
        main(["classify", "--adapted", str(model), "--images", str(images), "--out", str(tables[-1])])
    assert rows(tables[1]) == rows(tables[0])
    assert len(rows(tables[0])) == 30


def test_unusable_support_images(checkpoint: Path, support: Path, tmp_path: Path, fails: Fails) -> None:
    folder = shutil.copytree(support, tmp_path / "support")
    (folder / "new20" / "broken.png").write_bytes((folder / "new20" / "00.png").read_bytes()[:60])
    shutil.copy(folder / "new21" / "00.png", folder / "new22" / "copy.png")
    (folder / "empty").mkdir()
    arguments = ["adapt", "--ckpt_path", str(checkpoint), "--support", str(folder), "--out", str(tmp_path / "m")]
    said = fails(*arguments, code=1)
    for part in (
        "has 4 that cannot be used",
        "new20/broken.png (damaged",
        "new22/copy.png (the same image as",
        "empty (a class",
    ):
        assert part in said
    assert not (tmp_path / "m").exists()
    with pytest.warns(UserWarning, match="they are left out"):
        adapted = main([*arguments, "--on_error", "skip"])
    assert adapted.about["adaptation"]["examples"] == {"new20": 3, "new21": 3, "new22": 2}


def test_mistakes_in_adapting(checkpoint: Path, support: Path, model: Path, tmp_path: Path, fails: Fails) -> None:
    good = {"--ckpt_path": str(checkpoint), "--support": str(support), "--out": str(tmp_path / "m")}

    def said(code: int, **changes: str) -> str:
        given = good | {f"--{key}": value for key, value in changes.items()}
        return fails("adapt", *(part for pair in given.items() for part in pair), code=code)

    assert "there is no option --suport - did you mean --support?" in said(2, suport="x")
    assert "optimizer=Adm: there is no such class - did you mean fomal.inner.Adam?" in said(2, optimizer="Adm")
    assert "steps=many: expected" in said(2, steps="many")
    assert "--device nowhere cannot be used" in said(2, device="nowhere")
    assert "exists already: give another folder, or remove it" in said(1, out=str(model))
    assert "support='gone' does not exist: give a folder or a zip" in said(1, support="gone")
    assert "gone.ckpt: there is no such file" in said(1, ckpt_path="gone.ckpt")
    assert "steps=0 must be at least 1" in said(1, steps="0")
    assert "are required: ckpt_path" in fails("adapt", "--support", "x", "--out", "y")
    assert not (tmp_path / "m").exists()


def test_classify_writes_every_probability(model: Path, queries: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "labels.csv"
    predictions = main(["classify", "--adapted", str(model), "--images", str(queries), "--out", str(out)])
    table = rows(out)
    files = sorted(queries.rglob("*.png"))
    assert [row["file"] for row in table] == [path.relative_to(queries).as_posix() for path in files]
    expected = Adapted.load(model).predict(files)
    assert [row["label"] for row in table] == expected.labels == predictions.labels
    for row, probabilities in zip(table, expected.probabilities.tolist(), strict=True):
        found = [float(row[label]) for label in ("new20", "new21", "new22")]
        assert found == pytest.approx(probabilities, abs=2e-6)
        assert row["label"] == max(("new20", "new21", "new22"), key=lambda label: float(row[label]))


def test_labelled_folders_are_judged(
    model: Path, queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(queries, tmp_path / "queries")
    (folder / "unknown").mkdir()
    shutil.copy(folder / "new20" / "00.png", folder / "unknown" / "00.png")
    out, sheet = tmp_path / "labels.csv", tmp_path / "sheet.png"
    main(["classify", "--adapted", str(model), "--images", str(folder), "--out", str(out), "--sheet", str(sheet)])
    said = capsys.readouterr().out
    judged = [(row["file"].split("/")[0], row["label"]) for row in rows(out) if not row["file"].startswith("unknown")]
    right = sum(true == found for true, found in judged)
    assert f"Accuracy {100 * right / 30:.1f} % ({right} of 30 images in folders of their classes" in said
    assert "1 images are in folders of no class" in said
    for true in ("new20", "new21", "new22"):
        counts = [judged.count((true, found)) for found in ("new20", "new21", "new22")]
        (line,) = [line for line in said.splitlines() if line.startswith(f"│ {true}")]
        assert [int(cell) for cell in line.split("│")[2:5]] == counts
    with Image.open(sheet) as image:
        assert image.width > 500


def test_files_and_images_seen_together(
    model: Path, queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(path) for path in sorted(queries.rglob("*.png"))[:7]]
    out = tmp_path / "labels.csv"
    main(["classify", "--adapted", str(model), "--images", *files, "--out", str(out), "--transductive"])
    expected = Adapted.load(model).predict(files, transductive=True)
    assert [row["file"] for row in rows(out)] == files
    assert [float(row["new20"]) for row in rows(out)] == pytest.approx(expected.probabilities[:, 0].tolist(), abs=2e-6)
    first = out.read_text()
    main(["classify", "--adapted", str(model), "--images", *files[:2], "--out", str(out)])
    assert (tmp_path / "labels_1.csv").read_text() == first  # nothing is lost
    assert len(rows(out)) == 2


def test_mistakes_in_classifying(model: Path, queries: Path, tmp_path: Path, fails: Fails) -> None:
    folder = spoilt(queries, tmp_path)
    out = tmp_path / "labels.csv"
    good = ["classify", "--adapted", str(model), "--out", str(out), "--images"]
    said = fails(*good, str(folder), "--on_error", "raise", code=1)
    assert "has 2 that cannot be used" in said
    assert "cut.png" in said
    assert "text.png" in said
    only = fails(*good, str(folder / "cut.png"), code=1)
    assert "has 1 that cannot be used" in only
    assert "images='gone.png' does not exist: give files, or one folder or zip" in fails(*good, "gone.png", code=1)
    assert "give one folder alone, or files" in fails(*good, str(folder), str(folder))
    assert "a figure can be" in fails(*good, str(folder), "--sheet", "sheet.docx")
    assert "is no adapted model: it has no model.json" in fails(
        "classify", "--adapted", str(tmp_path), "--out", str(out), "--images", str(folder), code=1
    )
    assert not out.exists()
    (tmp_path / "none").mkdir()
    assert "has no image to classify" in fails(*good, str(tmp_path / "none"), code=1)
    with pytest.warns(UserWarning, match="they are left out"):
        main([*good, str(folder), "--on_error", "skip"])
    assert len(rows(out)) == 30
    assert "error" not in rows(out)[0]
    for options in (["--separator", ";;"], ["--encoding", "x"], ["--include", "no*"], ["--labels", "gone.csv"]):
        assert options[0].strip("-") in fails(*good, str(folder), *options, code=1)


def test_what_is_read_is_not_written_over(model: Path, queries: Path, tmp_path: Path, fails: Fails) -> None:
    folder = shutil.copytree(queries, tmp_path / "images")
    image = next(folder.rglob("*.png"))
    (tmp_path / "link.png").symlink_to(image)
    (tmp_path / "labels.csv").write_text(f"file,label\n{image.relative_to(folder)},new20\n")
    adapted = shutil.copytree(model, tmp_path / "model")
    archive = Path(shutil.make_archive(str(tmp_path / "images"), "zip", folder))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    good = ["classify", "--adapted", str(adapted), "--labels", str(tmp_path / "labels.csv"), "--images"]
    said = "is one of the files that are read: give another path."
    for images, out in (
        (folder, image),
        (folder, tmp_path / "link.png"),
        (image, image),
        (archive, archive),
        (folder, tmp_path / "labels.csv"),
        (folder, adapted / "model.json"),
    ):
        assert fails(*good, str(images), "--out", str(out), code=1) == f"out={out} {said}"
    table = str(tmp_path / "table.png")
    assert fails(*good, str(folder), "--out", table, "--sheet", str(image), code=1) == f"sheet={image} {said}"
    assert "is the table of --out too" in fails(*good, str(folder), "--out", table, "--sheet", table)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def spoilt(queries: Path, tmp_path: Path) -> Path:
    """The queries and two files that cannot be read."""
    folder = shutil.copytree(queries, tmp_path / "queries")
    (folder / "text.png").write_text("text")
    (folder / "cut.png").write_bytes((folder / "new20" / "00.png").read_bytes()[:60])
    return folder


@pytest.mark.parametrize("transductive", [[], ["--transductive"]])
def test_no_file_stops_the_others(
    model: Path, queries: Path, tmp_path: Path, fails: Fails, transductive: list[str]
) -> None:
    folder, out = spoilt(queries, tmp_path), tmp_path / "labels.csv"
    files = [str(folder / name) for name in ("new20/00.png", "cut.png", "gone.png", "new21/01.png", "new22/02.png")]
    arguments = ["classify", "--adapted", str(model), "--out", str(out), *transductive, "--images"]
    said = fails(*arguments, *files, code=1)
    assert said.startswith(
        f"{out} is written, but images='4 files' has 2 that cannot be used: {files[2]} (no such file);"
    )
    table = {row["file"]: row for row in rows(out)}
    assert sorted(table) == sorted(files)
    good = [files[0], files[3], files[4]]
    expected = Adapted.load(model).predict(good, bool(transductive))
    for name, label, shares in zip(good, expected.labels, expected.probabilities.tolist(), strict=True):
        assert (table[name]["label"], table[name]["error"]) == (label, "")
        assert [float(table[name][c]) for c in ("new20", "new21", "new22")] == pytest.approx(shares, abs=2e-6)
    for name, error in ((files[1], "damaged"), (files[2], "no such file")):
        assert error in table[name]["error"]
        assert {table[name][column] for column in ("label", "new20", "new21", "new22")} == {""}


def test_a_file_that_vanishes_while_others_are_classified_has_a_row(
    model: Path, queries: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = shutil.copytree(queries, tmp_path / "queries"), tmp_path / "labels.csv"

    def scan_and_lose(*args: object) -> tuple[None, dict[str, str]]:
        (folder / "new21" / "03.png").unlink()
        return None, {}

    monkeypatch.setattr("fomal.cli.classify.scan", scan_and_lose)
    said = fails("classify", "--adapted", str(model), "--out", str(out), "--images", str(folder), code=1)
    assert "has 1 that cannot be used: new21/03.png (" in said
    errors = {row["file"]: row["error"] for row in rows(out)}
    assert len(errors) == 30
    assert [name for name, error in errors.items() if error] == ["new21/03.png"]


def test_tables_of_classes_and_patterns(
    checkpoint: Path, support: Path, model: Path, queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As other people write them, of a folder without folders, with masks beside the pictures."""
    for source, name in ((support, "few"), (queries, "new")):
        (tmp_path / name).mkdir()
        lines = ["Datei;Klasse"]
        for path in sorted(source.rglob("*.png")):
            flat = f"{path.parent.name}_{path.stem}"
            shutil.copy(path, tmp_path / name / f"{flat}.png")
            (tmp_path / name / f"{flat}_mask.png").write_text("no image")
            lines.append(f"{name}\\{flat};{path.parent.name}")
        (tmp_path / f"{name}.csv").write_text("\n".join(lines), "utf-16")
    options = ["--file_column", "datei", "--label_column", "klasse", "--exclude", "*_mask.*"]
    given = ["--support", str(tmp_path / "few"), "--labels", str(tmp_path / "few.csv"), *options]
    main(["adapt", "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "m"), *given])
    assert torch.equal(Adapted.load(tmp_path / "m").network.head.weight, Adapted.load(model).network.head.weight)
    given = ["--images", str(tmp_path / "new"), "--labels", str(tmp_path / "new.csv"), *options]
    capsys.readouterr()
    predictions = main(["classify", "--adapted", str(model), "--out", str(tmp_path / "l.csv"), *given])
    expected = main(["classify", "--adapted", str(model), "--out", str(tmp_path / "k.csv"), "--images", str(queries)])
    assert predictions.labels == expected.labels
    by_table, by_folders = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Accuracy"))
    assert by_table == by_folders.replace("in folders of their classes", "with their classes")


def test_support_of_one_class_or_several_splits_is_refused(
    checkpoint: Path, support: Path, tmp_path: Path, fails: Fails
) -> None:
    arguments = ["adapt", "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "m"), "--support"]
    said = fails(*arguments, str(support), "--include", "*new20/*", code=1)
    assert "has one class, 'new20': there must be two at least to tell apart" in said
    for split in ("training", "test"):
        shutil.copytree(support, tmp_path / "splits" / split)
    assert "has images of several splits, test, train: give those of one" in fails(
        *arguments, str(tmp_path / "splits"), code=1
    )
    shutil.rmtree(tmp_path / "splits" / "test")
    main([*arguments, str(tmp_path / "splits"), "--steps", "1"])
    assert Adapted.load(tmp_path / "m").classes == ["new20", "new21", "new22"]


def test_many_classes_show_the_most_frequent_confusions(capsys: pytest.CaptureFixture[str]) -> None:
    classes = [f"c{i:02}" for i in range(20)]
    truth = ["c03"] * 5 + ["c07"] * 2 + ["c01"] * 3
    found = ["c04"] * 5 + ["c08"] * 2 + ["c01"] * 3
    _print_accuracy(classes, truth, Predictions(found, torch.zeros(10, 20)))
    said = capsys.readouterr().out
    assert "Accuracy 30.0 % (3 of 10 images" in said
    lines = [line for line in said.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line.split("│")[1:4]] for line in lines] == [
        ["c03", "c04", "5"],
        ["c07", "c08", "2"],
    ]


def test_wilsons_interval_is_that_of_its_equation() -> None:
    """The ends are the shares p at which the observed one is z standard deviations of p away."""
    for right, total in ((0, 10), (7, 10), (50, 100), (100, 100)):
        for end in wilson(right, total):
            assert total * (right / total - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end), abs=1e-9)


def test_export_names_what_goes_in_and_out(
    model: Path, tmp_path: Path, fails: Fails, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.pt2"
    main(["export", "--adapted", str(model), "--format", "torch-export", "--out", str(path), "--transductive"])
    said = capsys.readouterr().out
    assert f"{path} equals the model on random images." in said
    assert "It takes images (B, 3, 10, 10) uint8 and gives probabilities (B, 3)" in said
    main(["export", "--adapted", str(model), "--format", "torch-export"])
    assert "It takes images (1, 3, 10, 10) uint8" in capsys.readouterr().out
    assert (model / "model.pt2").is_file()
    assert "exists already" in fails("export", "--adapted", str(model), "--format", "torch-export", code=1)
    assert "invalid choice: 'tflite'" in fails("export", "--adapted", str(model), "--format", "tflite")
    assert json.loads((model / "model.json").read_text())["classes"] == ["new20", "new21", "new22"]


def test_hostile_names_are_shown_and_quoted_and_come_back(
    checkpoint: Path, support: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No escape code reaches the terminal, no formula the table, no markup rich, no mathematics the figure."""
    classes = {"new20": "=cmd()", "new21": "[red]a\x1b[31m\x9b2J", "new22": r"$\frac{$"}
    for old, new in classes.items():
        shutil.copytree(support / old, tmp_path / "images" / new)
    images, model, table = str(tmp_path / "images"), str(tmp_path / "m"), tmp_path / "labels.csv"
    main(["adapt", "--ckpt_path", str(checkpoint), "--support", images, "--out", model])
    main(["classify", "--adapted", model, "--images", images, "--out", str(table), "--sheet", f"{tmp_path}/s.png"])
    with pytest.raises(SystemExit, match="1"):
        main(["classify", "--adapted", f"{model}\x1b[31m", "--images", images, "--out", str(table)])
    said = "".join(capsys.readouterr())
    assert not {"\x1b", "\x9b"} & set(said)
    for name in ("=cmd()", r"[red]a\x1b[31m\x9b2J", r"$\frac{$", r"m\x1b[31m"):
        assert name in said
    found = rows(table)
    assert list(found[0]) == ["file", "label", r"$\frac{$", "'=cmd()", "[red]a\x1b[31m\x9b2J", "error"]
    assert [row["file"][:7] for row in found if "cmd" in row["file"]] == ["'=cmd()"] * 3
    listing = by_labels(open_source(images), str(table))
    assert {file.name for file in listing.files} == {
        str(path.relative_to(images)) for path in Path(images).rglob("*.png")
    }
    assert {file.label for file in listing.files} <= set(classes.values())
