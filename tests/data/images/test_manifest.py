"""Which file belongs to which class and split, by tables."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest

from fomal.data.images.columns import TableSettings
from fomal.data.images.listing import Listed, Listing
from fomal.data.images.manifest import by_labels, list_images
from fomal.data.images.selection import Selection
from fomal.data.images.source import open_source
from tests.helpers.listings import tree
from tests.helpers.pictures import zipped


def table(folder: Path, text: str, name: str = "labels.csv", encoding: str = "utf-8") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(text.encode(encoding))
    return str(folder / name)


def files(root: Path, labels, *args, **settings) -> list[Listed]:
    return by_labels(open_source(str(root)), labels, *args, **settings).files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tree(tmp_path / "root", "a.png", "b.png")


TWO = [Listed("a.png", "x"), Listed("b.png", "y")]


def test_a_csv_names_classes_and_splits(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "a.png", "b, c.png", "sub/d.png", "not named.png")
    text = 'split,label,filename,remark\r\nTesting," pear ","b, c.png",x\r\ntrain,é,a.png,\r\nvalid,fig,sub/d.png,\r\n'
    expected = [Listed("sub/d.png", "fig", "val"), Listed("b, c.png", "pear", "test"), Listed("a.png", "é", "train")]
    listing = Listing(expected, [], {"not named.png": "that the table does not name"})
    outside = table(tmp_path / "elsewhere", text, encoding="utf-8-sig")
    assert by_labels(open_source(str(root)), outside) == listing
    assert by_labels(open_source(str(zipped(root, tmp_path / "root.zip"))), outside) == listing
    table(root, text)
    assert by_labels(open_source(str(root)), "labels.csv") == listing
    assert by_labels(open_source(str(zipped(root, tmp_path / "with.zip"))), "labels.csv") == listing


def test_the_images_of_a_csv_may_lie_below_images(tmp_path: Path) -> None:
    root = tree(tmp_path, "images/a.png", "images/b.png", "a.png")  # the last by chance
    assert files(root, table(tmp_path, "filename,label\na.png,x\nb.png,y\n")) == [
        Listed("images/a.png", "x"),
        Listed("images/b.png", "y"),
    ]


# -- columns


@pytest.mark.parametrize("file", ["filename", "File Name", "file_name", "path", "image-path", "IMAGE", "name", "id"])
@pytest.mark.parametrize("label", ["label", "Class", "category", "target", "class_name", "y"])
def test_columns_are_found_by_their_usual_names(file: str, label: str, root: Path, tmp_path: Path) -> None:
    assert files(root, table(tmp_path, f"{label};remark;{file}\nx;?;a.png\ny;?;b.png\n")) == TWO


def test_columns_are_chosen_by_settings(root: Path, tmp_path: Path) -> None:
    path = table(tmp_path, "filename,Fine Label,label,where\na.png,x,1,train\nb.png,y,1,eval\n")
    assert [file.label for file in files(root, path)] == ["1", "1"]
    settings = TableSettings(label_column="fine_label", split_column="where")
    assert files(root, path, settings) == [Listed("a.png", "x", "train"), Listed("b.png", "y", "test")]
    with pytest.raises(ValueError, match="has no column 'lable', which label_column names, but 'filename', 'Fine Labe"):
        files(root, path, TableSettings(label_column="lable"))
    with pytest.raises(ValueError, match="has no column 'part', which split_column names"):
        files(root, path, TableSettings(split_column="part"))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "filename,kind",
            "has no column label, but 'filename', 'kind': name that of the label",
        ),
        (
            "a.png,x",
            "has no column filename, but 'a.png', 'x': name that of the file by file_column",
        ),
        ("", "has no column filename, but none at all"),
        (
            "filename,class,category",
            "has several columns that may be the label, 'class', 'category'",
        ),
        ("path,image,label", "has several columns that may be the file, 'path', 'image': say which by file_column"),
        ("label,filename,label", "has several columns that may be the label, 'label', 'label'"),
    ],
)
def test_columns_that_are_not_clear_are_refused(header: str, message: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^labels='.*labels.csv' {message}"):
        files(root, table(tmp_path, f"{header}\n"))


# -- files


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("./a.png", "././b.png"),
        ("a", "b"),  # without their ending
        ("A.PNG", "b.Png"),
        ("root/a.png", "root/b.png"),  # the root's own name
        (".\\a.png", "b.png"),
        ("root\\a.png", "root\\b.png"),
        ("{root}/a.png", "{root}/b.png"),
        ("../{name}/a.png", "../{name}/./b.png"),  # relative to the table, and below the root
        (" a.png ", '" b.png "'),
    ],
)
def test_files_are_found_however_they_are_written(first: str, second: str, root: Path, tmp_path: Path) -> None:
    first, second = (cell.format(root=root, name=f"{tmp_path.name}/root") for cell in (first, second))
    assert files(root, table(tmp_path, f"filename,label\n\n{first},x\n{second} , y \n,\n")) == TWO


def test_paths_are_relative_to_the_current_folder_too(root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path.parent)
    path = table(tmp_path / "lists", f"filename,label\n{tmp_path.name}/root/a.png,x\n{tmp_path.name}/root/b.png,y\n")
    assert files(root, path) == TWO
    (tmp_path / "link").symlink_to(root)
    assert files(tmp_path / "link", path) == TWO


def test_an_ending_that_lacks_must_be_clear_and_a_name_that_is_there_counts_first(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "0001.jpg", "0002.jpg", "0002.png", "0003", "0003.png", "0004.txt", "v1.2.jpg")
    (root / "0003").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert files(root, table(tmp_path, "id,label\n0001,x\n0003,y\nv1.2,z\n")) == [
        *(Listed("0001.jpg", "x"), Listed("0003", "y"), Listed("v1.2.jpg", "z"))
    ]
    message = r"1 name a file without its ending that several have \('0002', which may be '0002.jpg' or '0002.png'\); "
    with pytest.raises(ValueError, match=f"{message}1 name files that root=.* lacks \\('0004'\\): mend or remove"):
        files(root, table(tmp_path, "id,label\n0002,x\n0004,y\n"))


def test_names_in_another_normal_form_are_found(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    root = tree(tmp_path / "root", decomposed)
    assert files(root, table(tmp_path, f"filename,label\n{composed},x\n")) == [Listed(decomposed, "x")]


@pytest.mark.parametrize("cell", ["../secret.png", "/etc/hostname", "{outside}", "a.png/../../secret.png", "C:\\b.png"])
def test_nothing_outside_the_root_is_reached(cell: str, root: Path, tmp_path: Path) -> None:
    outside = tree(tmp_path, "secret.png") / "secret.png"
    path = table(tmp_path, f"filename,label\n{cell.format(outside=outside)},x\na.png,y\n")
    with pytest.raises(ValueError, match="1 name files that root=.* lacks"):
        files(root, path)


# -- rows that cannot be used

FAULTY = (
    "filename,label,split\na.png,x,train\na.png,x,train\nb.png,y,train\nb.png,y,test\nc.png,z,train\nd.png,,train\n"
    ",x,train\ne.png,x,middle\nf.png,x,train,5\ng.png,x,train\n"
)


def test_all_rows_that_cannot_be_used_are_said_at_once(root: Path, tmp_path: Path) -> None:
    tree(root, "d.png", "e.png", "f.png")
    path = table(tmp_path, FAULTY)
    parts = (
        r"1 name a file twice \('a.png'\)",
        r"1 name a file as of several classes or splits \('b.png' as 'train/y' and 'test/y'\)",
        r"2 lack a file or a class \(line 7, line 8\)",
        r"1 have a split that is none of train, val, test \(line 9: 'middle'\)",
        r"1 have more cells than there are columns \(line 10\)",
        r"2 name files that root='.*' lacks \('c.png', 'g.png'\)",
    )
    with pytest.raises(
        ValueError, match="has 8 rows that cannot be used: .*: mend or remove them, or set on_error"
    ) as e:
        files(root, path)
    for part in parts:
        e.match(part)
    with pytest.warns(UserWarning, match="has 8 rows that cannot be used: .*: they are left out") as warned:
        assert files(root, path, on_error="skip") == [Listed("a.png", "x", "train")]
    for part in parts:
        assert any(e.match(part) for _ in warned)


def test_many_faults_are_cut_but_counted(root: Path, tmp_path: Path) -> None:
    rows = "".join(f"gone{i}{'x' * 100_000 if i == 1 else ''}.png,x\n" for i in range(30))
    with pytest.raises(ValueError, match="has 30 rows .*: 30 name files .*'gone0.png'.* and 25 more") as error:
        files(root, table(tmp_path, f"filename,label\n{rows}"))
    assert len(str(error.value)) < 1000
    with (
        pytest.warns(UserWarning, match="30 rows"),
        pytest.raises(ValueError, match="has no row that can be used"),
    ):
        files(root, table(tmp_path, f"filename,label\n{rows}"), on_error="skip")


def test_two_spellings_of_one_class_and_half_a_column_of_splits(root: Path, tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    labels = [
        file.label for file in files(root, table(tmp_path, f"file,label\na.png,{decomposed}\nb.png,{composed}\n"))
    ]
    assert labels == [composed, composed]
    with pytest.raises(ValueError, match="gives some rows a split and others none: fill the column"):
        files(root, table(tmp_path, "file,label,split\na.png,x,train\nb.png,y,\n"))


# -- tables


def test_one_table_for_each_split(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "a.png", "b.png", "c.png")
    train = table(root, "file,label\na.png,1\n", "my_train.csv")
    val = table(tmp_path, "file;class\nb;2\n", "valid.csv")
    test = table(tmp_path, json.dumps({"file_name": "c.png", "label": 3}), "test.jsonl")
    expected = [Listed("a.png", "1", "train"), Listed("b.png", "2", "val"), Listed("c.png", "3", "test")]
    assert files(root, ["my_train.csv", val, test]) == expected
    assert files(root, {"training": train, "VAL": val, "test": test}) == expected
    with pytest.raises(ValueError, match=r"^labels='my_train.csv' and 1 more has 1 rows .* \('a.png' as 'train/1'"):
        files(root, ["my_train.csv", table(tmp_path, "file,label\na.png,1\n", "test.csv")])
    with pytest.raises(ValueError, match="^labels: 'first' is none of train, val, test"):
        files(root, {"first": train})
    with pytest.raises(ValueError, match="^labels names no table"):
        files(root, [])


def test_tables_that_are_not_there_or_no_tables(root: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"^labels='no.csv' is neither a file nor one in root='.*root'"):
        files(root, "no.csv")
    with pytest.raises(ValueError, match=r"^labels='.*labels.csv' is not text in utf-8: save it in UTF-8, or set enc"):
        files(root, table(tmp_path, "filename,label\na.png,é\n", encoding="latin1"))
    latin = table(tmp_path, "filename,label\na.png,é\nb.png,y\n", encoding="latin1")
    assert files(root, latin, TableSettings(encoding="latin-1"))[1].label == "é"
    os.mkfifo(tmp_path / "fifo.csv")
    for path in (tmp_path / "fifo.csv", root, Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"^labels='{path}' cannot be read: .*; give a CSV file") as error:
            files(root, str(path))
        assert "\n" not in str(error.value)
    monkeypatch.setattr("fomal.data.images.manifest.LARGEST_TABLE", 10)
    with pytest.raises(ValueError, match="cannot be read: it has 30 bytes, more than the 10 allowed"):
        files(root, table(tmp_path, "filename,label\na.png,x\nb.png,\n"))


def test_patterns_reach_tables(root: Path, tmp_path: Path) -> None:
    listing = by_labels(
        open_source(str(root)),
        table(tmp_path, "filename,label\na.png,x\nb.png,y\n"),
        selection=Selection.of(None, "B.*"),
    )
    assert listing == Listing([Listed("a.png", "x")], [], {"b.png": "that exclude names"})
    with pytest.raises(ValueError, match="^labels=.* names no image that include and exclude leave: mend the patterns"):
        files(tree(root, "c.png"), str(tmp_path / "labels.csv"), selection=Selection.of("c.*", None))


# -- Hugging Face's


def test_metadata_beside_images_is_found(tmp_path: Path, capsys, caplog) -> None:
    root = tree(tmp_path / "root", "a.png", "sub/b.png", "c.png")
    table(root, "file_name,text,label\na.png,?,0\nsub/b.png,?,1\n", "metadata.csv")
    with caplog.at_level("INFO"):
        listing = list_images(open_source(str(root)))
    assert listing.files == [Listed("a.png", "0"), Listed("sub/b.png", "1")]
    assert listing.left_out == {"c.png": "that the table does not name"}
    assert "classes are those of '" in caplog.text + capsys.readouterr().err
    assert list_images(open_source(str(zipped(root, tmp_path / "z.zip")))).files == listing.files


def test_metadata_of_each_split(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "d/train/0.png", "d/validation/0.png", "d/test/0.png")
    for split, label in (("train", 7), ("validation", 8), ("test", 9)):
        table(root / "d" / split, json.dumps({"file_name": "0.png", "label": label}), "metadata.jsonl")
    assert list_images(open_source(str(root))).files == [
        Listed("d/train/0.png", "7", "train"),
        Listed("d/validation/0.png", "8", "val"),
        Listed("d/test/0.png", "9", "test"),
    ]


def test_metadata_without_classes_leaves_the_folders(tmp_path: Path, capsys, caplog) -> None:
    root = tree(tmp_path / "root", "a/0.png", "b/0.png")
    table(root, "file_name,text\na/0.png,?\n", "metadata.csv")
    with caplog.at_level("INFO"):
        assert [file.label for file in list_images(open_source(str(root))).files] == ["a", "b"]
    assert "has no column of classes, so folders are classes" in caplog.text + capsys.readouterr().err
    settings = TableSettings(label_column="text")
    assert list_images(open_source(str(root)), settings=settings).files == [Listed("a/0.png", "?")]
    table(root, "filename,label\nx,y\n", "metadata.csv")  # somebody else's
    assert [file.label for file in list_images(open_source(str(root))).files] == ["a", "b"]
