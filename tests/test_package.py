"""The wheel outside of the repository: types, page templates, and a crosscoder fitted, saved, exported and read."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from project import ROOT

USE = """
import sys
from pathlib import Path
import torch
import featdiff
from featdiff.activations.tensor import ActivationTensor
from featdiff.config.dictionary import CrosscoderTraining
from featdiff.crosscoder.exchange import main
from featdiff.crosscoder.fit import fit
from featdiff.crosscoder.measure import measure
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader
from featdiff.pipeline.checkpoint import Scratch
from featdiff.report.build import render
from featdiff.stats import bootstrap_mean
from featdiff.tasks.verify import grade

assert Path(featdiff.__file__).is_relative_to(sys.argv[1]), featdiff.__file__
source = ActivationTensor(["a", "b"], torch.randn(600, 2, 8, generator=torch.Generator().manual_seed(0)))
training = CrosscoderTraining(
    n_features=32, batch_tokens=64, steps=20, lr=1e-3, warmup_share=0.1, decay_share=0.2, k=4, aux_k=4, aux_weight=0.03,
    dead_after_tokens=10_000, l1_weight=1.0, l1_warmup_share=0.1, decoder_norm=0.1, heldout_share=0.1, log_every=10,
)
fitted = fit(source, "batchtopk", training, 0, lambda *_: None, "mine", scratch=Scratch())
metrics, _ = measure(source, *fitted)
Path("mine").mkdir()
fitted.crosscoder.save(Path("mine"))
assert torch.equal(Crosscoder.load(Path("mine")).W_dec, fitted.crosscoder.W_dec)
assert Reader(fitted.crosscoder, "a")(source.acts_NMD[:, 0]).shape == (600, 32)
assert main(["saelens", "mine", "sae", "--model", "b"]) == 0
print(f"{metrics['l0']:.1f}")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):  # built from a copy: setuptools writes beside its sources
        shutil.copy(ROOT / name, out)
    shutil.copytree(ROOT / "src", out / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir", "."]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True, cwd=out)
    (found,) = out.glob("*.whl")
    return found


def test_it_holds_types_and_templates_and_nothing_beside_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    package = ROOT / "src/featdiff"
    assert "featdiff/py.typed" in names
    kept = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.suffix in (".py", ".j2", ".css", ".js")
    }
    assert kept <= set(names)
    assert {name.split("/")[0] for name in names} == {"featdiff", names[-1].split("/")[0]}


def test_the_library_works_outside_of_the_repository(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    done = subprocess.run(
        [sys.executable, "-c", USE, str(site)], cwd=elsewhere, env={"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert 1 < float(done.stdout.splitlines()[-1]) < 12, "about k features are active"
