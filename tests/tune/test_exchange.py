"""--export and --import: everything arrives, nothing is lost, and what is wrong is refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llmopt.tune.environment import Environment
from llmopt.tune.exchange import export_file, import_file

from tests.tune.problems import FACTS, HERE, database, entry, problem

OTHER = Environment.of({**FACTS, "name": "another CPU"})


def exported(tmp_path: Path) -> Path:
    """A file with two entries of this environment and one of another."""
    root = tmp_path / "source"
    database(root).put(entry())
    database(root).put(entry(problem(m=8)))
    database(root, OTHER).put(entry(us=3.0))
    path = tmp_path / "exported.json"
    assert export_file(root, path) == 3
    return path


def test_a_round_trip_brings_everything(tmp_path):
    path, root = exported(tmp_path), tmp_path / "target"
    found = {i.environment: i for i in import_file(root, path)}
    assert (found[HERE].added, found[HERE].kept, found[HERE].unusable) == (2, 0, ())
    assert (found[OTHER].added, found[OTHER].kept) == (1, 0)
    assert database(root).get(entry().key) == (entry(), "")
    again = tmp_path / "again.json"
    assert export_file(root, again) == 3
    assert json.loads(again.read_text()) == json.loads(path.read_text())


def test_what_another_machine_measured_is_not_used_here(tmp_path):
    path, root = exported(tmp_path), tmp_path / "target"
    given = json.loads(path.read_text())
    given["environments"] = [e for e in given["environments"] if e["facts"] == dict(OTHER.facts)]
    path.write_text(json.dumps(given))
    import_file(root, path)
    found, reason = database(root).get(entry().key)
    assert found is None
    assert "elsewhere: name another CPU (here some CPU)" in reason
    assert database(root, OTHER).get(entry().key)[0] == entry(us=3.0)


def test_what_is_there_already_stays(tmp_path):
    path, root = exported(tmp_path), tmp_path / "target"
    ours = entry(us=1.0)
    database(root).put(ours)
    found = {i.environment: i for i in import_file(root, path)}
    assert (found[HERE].added, found[HERE].kept) == (1, 1)
    assert database(root).get(ours.key)[0] == ours


def test_one_bad_entry_is_left_out_and_the_rest_arrives(tmp_path):
    path, root = exported(tmp_path), tmp_path / "target"
    given = json.loads(path.read_text())
    given["environments"][0]["entries"][0]["entry"]["us"] = 1e-9
    path.write_text(json.dumps(given))
    imported = import_file(root, path)
    assert sum(i.added for i in imported) == 2
    (reason,) = [r for i in imported for r in i.unusable]
    assert "checksum" in reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: "", "cannot be read"),
        (lambda text: "[]", "not a file that llmopt tune --export wrote"),
        (lambda text: text.replace("llmopt tuning", "a photo album"), "not a file that"),
        (lambda text: text.replace('"schema": 1', '"schema": 2', 1), "a newer llmopt wrote it"),
        (lambda text: text.replace('"environments"', '"settings"', 1), "is damaged"),
        (lambda text: text.replace('"facts"', '"fakes"'), "is damaged"),
    ],
    ids=["half", "empty", "a list", "another format", "newer", "no environments", "no facts"],
)
def test_a_file_that_is_wrong_adds_nothing(tmp_path, change, words):
    path, root = exported(tmp_path), tmp_path / "target"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=words):
        import_file(root, path)
    assert not root.exists()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        import_file(tmp_path, tmp_path / "nothing.json")


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="cannot write"):
        import_file(Path("/proc/llmopt"), exported(tmp_path))


def test_damaged_files_are_not_exported(tmp_path):
    root = tmp_path / "root"
    database(root).put(entry())
    database(root).put(entry(problem(m=8)))
    database(root).path_of(entry().key).write_bytes(b"{")
    assert export_file(root, tmp_path / "exported.json") == 1
