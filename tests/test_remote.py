"""Remotes: proved before they are set, refused in one line, and enough to read a report from."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from featdiff.artifacts.remote import main

pytestmark = pytest.mark.graph


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A repository with two computed stages, the working folder."""
    here = tmp_path / "one"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    graph = {
        "big": {"cmd": "mkdir big && echo 1 > big/a", "outs": ["big"]},
        "report": {"cmd": "mkdir report && echo 2 > report/index.html", "deps": ["big"], "outs": ["report"]},
    }
    (here / "dvc.yaml").write_text(yaml.safe_dump({"stages": graph}))
    run("git", "init", "--quiet")
    run("dvc", "init", "--quiet")
    run("dvc", "repro", "--quiet")
    return here


def run(*words):
    subprocess.run(words, check=True, capture_output=True)


def commit():
    run("git", "add", "--all")
    run("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "all")


def test_a_clone_reads_the_report_without_the_rest(shared, tmp_path, monkeypatch, capfd):
    assert main(["set", str(tmp_path / "store")]) == 0
    assert list((tmp_path / "store").iterdir()) == [], "the probe is removed"
    assert main(["push"]) == 0
    commit()
    run("git", "clone", "--quiet", str(shared), str(tmp_path / "two"))
    monkeypatch.chdir(tmp_path / "two")
    assert main(["pull", "report"]) == 0
    assert Path("report/index.html").read_text() == "2\n"
    assert not Path("big").exists()
    assert main(["pull"]) == 0
    assert Path("big/a").read_text() == "1\n"
    said = capfd.readouterr().out
    assert f"remote: {tmp_path / 'store'} can be written, read and cleaned; commit .dvc/config" in said
    assert "nothing to do" in said


def test_without_a_remote_one_line_says_what_to_do(shared, capfd):
    for word in ("push", "pull"):
        assert main([word]) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert "none is set" in said
        assert "make remote URL=<folder, s3://" in said


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("/proc/nope", "/proc/nope: cannot write to it"),
        ("ftp://somewhere", "ftp: no kind of address"),
        ("", "URL: no kind of address"),
        ("s3://key:hunter2@bucket/path", "holds a password or key (not shown)"),
        ("ssh://me:hunter2@host/path", "holds a password or key (not shown)"),
        ("s3://hunter2@bucket", "holds a password or key (not shown)"),
    ],
)
def test_a_bad_address_is_one_line_and_changes_nothing(shared, capfd, url, said):
    before = Path(".dvc/config").read_text()
    assert main(["set", url]) == 2
    out = capfd.readouterr()
    assert out.err.count("\n") == 1
    assert said in out.err
    assert "hunter2" not in out.err + out.out
    assert Path(".dvc/config").read_text() == before


def test_a_remote_that_loses_what_is_written_is_not_set(shared, tmp_path, capfd, monkeypatch):
    from dvc.fs import LocalFileSystem

    monkeypatch.setattr(LocalFileSystem, "cat_file", lambda *_, **__: b"something else")
    assert main(["set", str(tmp_path / "store")]) == 2
    assert "gives back other bytes than were written" in capfd.readouterr().err
    assert "store" not in Path(".dvc/config").read_text()


@pytest.mark.parametrize("words", [[], ["pull", "--force"], ["pull", "a;b"], ["set", "x", "--endpoint"], ["clean"]])
def test_what_it_cannot_do_is_one_line(capfd, words):
    assert main(words) == 2
    assert capfd.readouterr().err.count("\n") == 1
