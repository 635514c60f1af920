"""What is computed on another device than the CPU is what the CPU gives, and comes back to it.

PyTorch's lazy device stands in for a GPU: its tensors hold values, and an operation that is given one of them and one of the
CPU refuses, as CUDA does. It runs in this process and needs no hardware."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from featdiff.activations.tensor import ActivationTensor
from featdiff.attribution import dynamics
from featdiff.attribution.dynamics import block_changes, change_from_base, follow, refit, text_blocks
from featdiff.attribution.norms import attribute
from featdiff.attribution.scaling import latent_scaling
from featdiff.config.dictionary import AttributionParams, CrosscoderTraining, DynamicsParams
from featdiff.config.models import CheckpointsParams, EvaluateParams
from featdiff.config.sets import LocalizeParams
from featdiff.crosscoder.edits import Editor, largest_values
from featdiff.crosscoder.fit import Fitted
from featdiff.crosscoder.measure import feature_statistics
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import read_all
from featdiff.language.divergence import Divergence
from featdiff.language.evaluation import Evaluator, evaluate
from featdiff.language.models import stitched, truncate
from featdiff.localization.flipped import FlippedStreams, read_flipped
from featdiff.localization.robustness import mutual_matches
from featdiff.localization.search import Search
from featdiff.pipeline.checkpoint import Scratch
from featdiff.tasks.task import Sample, TaskInfo
from tiny import ROLES, ROOT, params_of, random_crosscoder, tiny_model

MODELS = ("base", "sft", "grpo")


@pytest.fixture(scope="module")
def lazy() -> torch.device:
    from torch._lazy import ts_backend

    ts_backend.init()  # once in a process
    return torch.device("lazy")


@pytest.fixture
def elsewhere(lazy: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch._C, "_InferenceMode", no_gradients)  # this device has no inference mode
    with pytest.raises(RuntimeError, match="not a lazy tensor"):
        print(torch.ones(2, device=lazy) + torch.ones(2))
    return lazy


def no_gradients(mode: bool) -> Any:
    return torch.set_grad_enabled(not mode)


def raw(seed: int, rows: int = 30) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


def both(found: Callable[[torch.device], Any], elsewhere: torch.device) -> None:
    """``found`` gives the same on either device, all of it on the CPU."""
    here, there = found(torch.device("cpu")), found(elsewhere)
    compare(here, there)


def compare(here: Any, there: Any) -> None:
    assert type(here) is type(there)
    if isinstance(here, Tensor):
        assert here.device == there.device == torch.device("cpu")
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5, equal_nan=True)
    elif isinstance(here, dict):
        assert list(here) == list(there)
        for name in here:
            compare(here[name], there[name])
    elif isinstance(here, list | tuple):
        for one, two in zip(here, there, strict=True):
            compare(one, two)
    elif isinstance(here, float):
        assert there == pytest.approx(here, rel=1e-4, abs=1e-5, nan_ok=True)
    else:
        assert here == there


def on(device: torch.device, models: tuple[str, ...] = MODELS, seed: int = 0) -> Crosscoder:
    return random_crosscoder(models, seed=seed, threshold=1.0).requires_grad_(False).to(device)


def test_largest_values_and_edits_are_of_the_device_asked_for(elsewhere: torch.device) -> None:
    source, crosscoder = ActivationTensor(["grpo"], raw(1)[:, None]), on(torch.device("cpu"))
    both(lambda device: largest_values(crosscoder, source, device), elsewhere)
    editor = Editor.of(crosscoder, 1, elsewhere, source, ROLES)
    assert editor.edit("add", [1, 2], "all", 1.0)(raw(2)[None].to(elsewhere), None, prompt=True).device.type == "lazy"


@pytest.mark.parametrize("readout", ["swap", "slot", "contribution"])
def test_every_readout(readout: Any, elsewhere: torch.device) -> None:
    streams = {model: raw(seed) for seed, model in enumerate(MODELS)}
    both(lambda device: read_all(on(device), streams, readout), elsewhere)


def test_dynamics(elsewhere: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamics, "READ_ROWS", 11)
    base, one, two, texts = raw(1), raw(2), raw(3), torch.arange(30) // 3
    params = params_of(DynamicsParams, "dynamics", top=[4], bootstrap=20)
    both(lambda device: change_from_base(on(device), base, one, "grpo"), elsewhere)
    both(lambda device: block_changes(on(device), base, one, "grpo", text_blocks(texts)), elsewhere)
    both(lambda device: follow("grpo", on(device), "grpo", base, {1: one, 2: two}, texts, params, 0), elsewhere)

    def refitted(device: torch.device) -> Tensor:
        """What follows the fit, which ends where it was trained."""
        monkeypatch.setattr(dynamics, "fit", lambda *_, warm, **__: Fitted(warm.to(device), torch.zeros(2, 6), 20))
        training = params_of(CrosscoderTraining, "crosscoder", "training")
        return refit(on(torch.device("cpu"), ("base", "grpo")), torch.stack([base, one], 1), training, 0, "grpo")

    both(refitted, elsewhere)


def test_attribution(elsewhere: torch.device) -> None:
    source = ActivationTensor(list(MODELS), torch.stack([raw(1), raw(2), raw(3)], dim=1))
    params = params_of(AttributionParams, "attribution")

    def found(device: torch.device) -> Any:
        crosscoder = on(device)
        scaling = latent_scaling(crosscoder, source, 3, 28)
        return scaling, attribute("fit", crosscoder, feature_statistics(crosscoder, source), scaling, params, [scaling])

    both(found, elsewhere)


def test_localization(elsewhere: torch.device) -> None:
    both(lambda device: mutual_matches(on(device), on(device, seed=1)), elsewhere)
    owner = torch.arange(30) // 5
    readings = {
        task: {"all": FlippedStreams({model: raw(seed + i) for i, model in enumerate(MODELS)}, owner, 6)}
        for seed, task in ((10, "a"), (20, "b"))
    }
    params = params_of(
        LocalizeParams,
        "localize",
        fit="one",
        seeds=["two"],
        positions="all",
        random_dictionary=None,
        shuffles=3,
    )

    def found(device: torch.device) -> Any:
        search = Search({"one": on(device), "two": on(device, seed=1)}, readings, params, ROLES)
        return search.differences(), search.robustness([1, 2], 0.05, 0), search.directions([1, 2], 0)

    both(found, elsewhere)


WORDS = TaskInfo("words", "find", "words", "generation", "organism", "strict", chat=False, options=0)
QUIZ = TaskInfo("quiz", "find", "words", "option_text", "letter", "strict", chat=False, options=2)
ASKED = [
    *(Sample(f"words-{i}", "words", "find", f"{'ab' * i}=", "a") for i in range(1, 4)),
    Sample("quiz-1", "quiz", "find", "which=", "B", ("red", "blue")),
]


def test_answers_of_models_and_of_stitched_ones(elsewhere: torch.device) -> None:
    tasks, tokenizer = {"words": WORDS, "quiz": QUIZ}, tiny_model()[1]
    params = EvaluateParams(batch_size=2, max_new_tokens=4, draws=1, temperature=1.0, confidence=0.95, bootstrap=20)

    def found(device: torch.device) -> Any:
        one, other = tiny_model(0)[0].to(device), tiny_model(1)[0].to(device)
        asked = [Evaluator(each, tokenizer, tasks, batch_size=2, max_new_tokens=4) for each in (one, stitched(one, other, 1))]
        return [evaluate(each, ASKED, params, 0, Scratch()) for each in asked]

    both(found, elsewhere)


def test_divergence(elsewhere: torch.device) -> None:
    params = CheckpointsParams(questions=4, prompts=3, batch_size=2, max_new_tokens=4, confidence=0.95, bootstrap=20)

    def found(device: torch.device) -> Any:
        base, checkpoint = tiny_model(0)[0].to(device), tiny_model(1)[0].to(device)
        here = Divergence(base, tiny_model()[1], ASKED[:3], {"words": WORDS}, params, 0)
        return here.measure(checkpoint, 1, here.answers(base))

    both(found, elsewhere)


def test_flipped_samples_are_read(elsewhere: torch.device) -> None:
    def found(device: torch.device) -> Any:
        trunks = {name: truncate(tiny_model(seed)[0].to(device), 1) for seed, name in enumerate(("base", "grpo"))}
        return read_flipped(trunks, tiny_model()[1], WORDS, ASKED[:3], ["a", "bb", "ccc"], 2)

    both(found, elsewhere)


def test_every_stage_hands_its_models_to_the_device() -> None:
    """Each model that a stage loads is moved at once, or as far as it is read, and so is each crosscoder, but for those that
    are read by what takes a device of its own: editors and fits."""
    told = {"intervene.py": {"Crosscoder.load(fit)"}, "describe.py": {"Crosscoder.load(fit)"},
            "dynamics.py": {"Crosscoder.load(run.read(f'crosscoders/{PAIR}{arm}'))"}}  # fmt: skip
    loaded = set()
    for path in sorted((ROOT / "stages").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        handed = [
            call.func.value
            for call in calls
            if isinstance(call.func, ast.Attribute) and call.func.attr == "to" and ast.unparse(call.args[0]) == "run.device"
        ]
        cut = [each.args[0] for each in handed if isinstance(each, ast.Call) and ast.unparse(each.func) == "truncate"]
        moved = set(map(ast.dump, [*handed, *cut]))
        for call in calls:
            if ast.unparse(call.func) in ("load_model", "Crosscoder.load"):
                loaded.add(path.name)
                assert ast.dump(call) in moved or ast.unparse(call) in told.get(path.name, ()), (
                    f"{path.name}: {ast.unparse(call)}"
                )
    assert loaded == {f"{name}.py" for name in (
        "attribution", "checkpoints", "describe", "dynamics", "evaluate", "intervene", "localize", "stitch"
    )}  # fmt: skip
