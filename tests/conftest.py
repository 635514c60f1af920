"""What several test files share: a project in a temporary folder, and a tiny model with random weights."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests share their cores with others

import pytest
from hypothesis import settings

from project import ALPHABET, Project

settings.register_profile("featdiff", deadline=None)  # a busy machine is no failure
settings.load_profile("featdiff")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path).fill()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of half a MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from featdiff.language.models import character_tokenizer

    return character_tokenizer([ALPHABET])


@pytest.fixture(scope="session")
def make_model(tokenizer: Any) -> Callable[..., Any]:
    """Qwen3 models of ``layers`` blocks of width 16, with weights large enough to give varied answers."""
    import torch

    from featdiff.config.models import Pretraining
    from featdiff.language.models import organism_model

    def make(seed: int = 0, layers: int = 2) -> Any:
        size = Pretraining(
            layers=layers, d_model=16, d_mlp=32, heads=2, row_tokens=64, batch_tokens=64, steps=1, lr=1.0, warmup_steps=0,
            decay_share=0.0, prompt_weight=1.0, weight_decay=0.0, threads=None,
        )  # fmt: skip
        model = organism_model(size, tokenizer, seed).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 0.6, generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world of ``taught.make_world``, written once."""
    from taught import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The evidence of the synthetic study of a ``Plan``, whose fields are the arguments; written once."""
    from functools import cache

    from featdiff.report.evidence import load
    from synthetic_study import Plan, write_study

    @cache
    def made(**changes: Any) -> Any:
        plan, folder = Plan(**changes), tmp_path_factory.mktemp("study")
        write_study(folder, plan)
        return load(lambda name, *_: folder / name, plan.study)

    return made
