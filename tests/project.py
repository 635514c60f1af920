"""A project in a temporary folder: this repository's sources and params, and nothing computed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from featdiff.artifacts import artifact
from featdiff.artifacts.provenance import Provenance, place

ALPHABET = "abcdef =."
ROOT = Path(__file__).resolve().parents[1]
PROGRESS = re.compile(r"[^\n\r]*?\d+%\|.*?\|.*?\[.*?\]")


def describe(folder: Path, root: Path, parents: dict[str, str]) -> None:
    """Write the provenance of the published ``folder``, which was made from ``parents``."""
    manifest = artifact.sha256_file(folder / artifact.MANIFEST)
    params = {"seed": 0, "sft": {"lr": 0.1}}
    place(folder, root, Provenance(manifest, "sft", params, artifact.hash_json("code"), {"torch": "2.8.0+cpu"}, parents))


class Project:
    """A folder with this repository's sources, params of the profile ``organism`` and no artifacts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "ACCELERATE_"))}
        self.environment |= {"FEATDIFF_MIRROR": "off", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def fill(self) -> Project:
        shutil.copytree(ROOT / "conf", self.path / "conf")
        shutil.copytree(ROOT / "stages", self.path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "dvc.yaml", self.path)
        self.fill_params()
        (self.path / "src").symlink_to(ROOT / "src")
        return self

    def fill_params(self) -> None:
        shutil.copy(ROOT / "conf/profiles/organism.yaml", self.path / "params.yaml")

    def set(self, changes: dict[str, Any]) -> None:
        """Change params, named by dotted keys."""
        path = self.path / "params.yaml"
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
        for dotted, value in changes.items():
            *sections, key = dotted.split(".")
            place = params
            for section in sections:
                place = place[section]
            place[key] = value
        path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")

    @contextmanager
    def publishing(self, name: str) -> Iterator[Path]:
        """A folder to fill, published at the end as the artifact ``name``."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        yield artifact.begin(target)
        artifact.publish(target)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """A Python process in the project's folder."""
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=self.path, env=self.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The same, to its end (two minutes at most)."""
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.path, env=self.environment, text=True, capture_output=True,
            check=False, timeout=120,
        )  # fmt: skip

    def refused(self, result: subprocess.CompletedProcess[str], out: str, *words: str) -> None:
        """Assert that ``result`` is one line with all ``words`` (beside progress bars), a non-zero exit, and no trace
        of ``out``."""
        assert result.returncode != 0
        assert "Traceback" not in result.stderr
        lines = [line for line in PROGRESS.sub("", result.stderr).splitlines() if line.strip()]
        assert len(lines) == 1, result.stderr
        for word in words:
            assert word in lines[0]
        self.without(out)

    def without(self, out: str) -> None:
        assert not (self.path / out).exists()
        assert not artifact.staging_path(self.path / out).exists()
