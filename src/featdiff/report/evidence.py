"""Everything the report reads, in memory: one object made from the artifacts of every earlier stage."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from featdiff.artifacts import tables
from featdiff.artifacts.artifact import read_json
from featdiff.artifacts.tables import Table
from featdiff.config.models import Arm, Roles
from featdiff.config.params import Study
from featdiff.intervention.purposes import SIDES
from featdiff.report.names import Names
from featdiff.tasks.task import Sample, TaskInfo, load_samples, load_tasks

ROLES = ("train", "find", "heldout", "control", "reported")
"""Of tasks, in the order in which they are shown."""

NOT_TESTED: dict[str, Any] = {
    "choice": {}, "search": [], "effects": [], "edited": [], "collateral": [], "sensitivity": [],
    "outcomes": {},
}  # fmt: skip
"""What is known of interventions where no feature set was found."""

Row = dict[str, Any]
Groups = dict[tuple[Any, ...], list[Row]]
Curves = dict[str, list[tuple[float, float]]]


def grouped(rows: Iterable[Row], *keys: str) -> Groups:
    """``rows`` by their values of ``keys``, in the order in which these come first."""
    groups: Groups = {}
    place = itemgetter(*keys) if len(keys) > 1 else lambda row: (row[keys[0]],)
    for row in rows:
        groups.setdefault(place(row), []).append(row)
    return groups


@dataclass(frozen=True)
class ModelFacts:
    """What is known of one model without loading it."""

    config: Row
    parameters: int
    audit: Row
    """What an arm was given; empty for the base, and without budgets for an arm that was trained elsewhere."""
    curves: Curves


@dataclass(frozen=True)
class FitFacts:
    """One crosscoder: configuration, final metrics, curves."""

    config: Row
    metrics: Row
    curves: Curves
    null: bool
    """Whether nothing in it can be one model's own (``Study.null``)."""

    @property
    def models(self) -> list[str]:
        """Its distinct models, the original first."""
        return list(dict.fromkeys(self.config["models"]))

    @property
    def joint(self) -> bool:
        return len(self.models) > 2


@dataclass(frozen=True)
class Evidence:
    """The artifacts of one study. Tables are lists of rows (featdiff.artifacts.tables)."""

    roles: Roles
    arms: Mapping[str, Arm]
    repeats: Mapping[str, list[str]]
    """All training runs of an arm, itself first, by the arm that params.yaml lists first."""
    tasks: dict[str, TaskInfo]
    """In the order of :data:`ROLES`."""
    questions: dict[str, Sample]
    """Report split by ``sample_id``."""
    models: dict[str, ModelFacts]
    """The base and every arm, as are ``accuracy`` and ``answers``."""
    accuracy: dict[str, list[Row]]
    answers: dict[str, list[Row]]
    """Per-sample rows of the report split, by model."""
    fits: dict[str, FitFacts]
    features: list[Row]
    checkpoints: dict[str, list[Row]]
    """Tables ``accuracy``, ``divergence`` and ``samples`` of every kept checkpoint of every arm."""
    overlap: list[Row]
    trajectories: list[Row]
    resampled: list[Row]
    """Overlap and change of every checkpoint in resamples of the texts; draw 0 is the sample itself."""
    localize: Row
    scores: list[Row]
    sweep: list[Row]
    """The selection at other thresholds."""
    stitched: list[Row]
    """Answers of the original and the tuned model stitched together (`stitch`)."""
    described: Row
    """What the features of the set are (`describe`)."""
    contexts: list[Row]
    """Texts on which they fire."""
    token_values: list[Row]
    """Their values at every token of the report questions."""
    probes: list[Row]
    """How well probes with the dictionary and without it read the manner."""
    choice: Row
    search: list[Row]
    """Everything that was tried on the tune split."""
    effects: list[Row]
    collateral: list[Row]
    """Free text under every edit."""
    sensitivity: list[Row]
    edited: list[Row]
    """Per-sample rows without an edit, under the set and along the directions that tell the models apart."""
    outcomes: Groups
    """Every answer under a control, by control and draw."""

    @cached_property
    def effects_of(self) -> Groups:
        """``effects`` by purpose, control and subset."""
        return grouped(self.effects, "purpose", "control", "subset")

    @cached_property
    def tried_with(self) -> Groups:
        """``search`` by purpose and control."""
        return grouped(self.search, "purpose", "control")

    @cached_property
    def names(self) -> Names:
        """What readers see of the models."""
        return Names(self.roles, self.arms)

    @property
    def compared(self) -> list[str]:
        """One run of every model: original, contrast, tuned, then the further arms."""
        return [*self.roles.models, *(arm for arm in self.repeats if not set(self.repeats[arm]) & set(self.roles.models))]

    def runs(self, model: str) -> list[str]:
        """``model``, then the other training runs of its arm."""
        found = next((runs for runs in self.repeats.values() if model in runs), [])
        return [model, *(run for run in found if run != model)]

    def named(self, *roles: str) -> list[str]:
        """Names of the tasks with one of ``roles``."""
        return [name for name, task in self.tasks.items() if task.role in roles]

    @property
    def far(self) -> list[str]:
        """Tasks away from the training domain that a model could learn: those the claims are about."""
        return [
            name
            for name, task in self.tasks.items()
            if task.domain != "math" and task.role in ("find", "heldout") and task.learnable
        ]

    @property
    def found_on(self) -> list[str]:
        """Tasks with enough flipped samples to take part in the selection of features."""
        return [name for name in self.tasks if name in self.localize["per_task"] and name not in self.localize["skipped"]]

    @property
    def blocks(self) -> int:
        """Of the original model."""
        return int(self.models[self.roles.original].config["num_hidden_layers"])

    @property
    def hooked(self) -> int:
        """Blocks below the layer at which features are read."""
        return int(self.fits[self.localize["fit"]].config["layer"])

    @property
    def set_size(self) -> int:
        return len(self.localize["features"])

    @property
    def n_features(self) -> int:
        return int(self.fits[self.localize["fit"]].config["n_features"])

    def primary_mode(self, task: str) -> str:
        """How the answers that count are got (``TaskInfo.primary_mode``)."""
        return self.tasks[task].primary_mode


def load(read: Callable[..., Path], study: Study) -> Evidence:
    """Open every artifact of ``study`` through ``read``, which verifies a folder and returns it.

    Raises ContractError where a table is not of its schema or a crosscoder that attribution names is missing."""
    data = read("data", "tasks.json", "eval.parquet")
    known = load_tasks(data)
    evals = {model: read(f"evals/{model}") for model in study.models}
    attribution, localize, stitch, describe = (
        read(f"analysis/{name}") for name in ("attribution", "localize", "stitch", "describe")
    )
    intervened = [read(f"analysis/intervene/{side}") for side in SIDES]
    dynamics = [read(f"analysis/dynamics/{arm}") for arm in study.dynamics.arms]
    checkpoints = [read(f"checkpoints/{arm}") for arm in study.arms]
    features = tables.FEATURES.read(attribution)
    found = read_json(localize / "features.json")
    return Evidence(
        roles=study.roles,
        arms=study.arms,
        repeats={runs[0]: runs for runs in map(study.repeats, study.arms)},
        tasks={name: task for role in ROLES for name, task in known.items() if task.role == role},
        questions={sample.sample_id: sample for sample in load_samples(data, "eval") if sample.split == "report"},
        models={model: _model(f"models/{model}", read) for model in study.models},
        accuracy={model: tables.EVAL_ACCURACY.read(folder) for model, folder in evals.items()},
        answers={model: tables.EVAL_SAMPLES.read(folder, split="report") for model, folder in evals.items()},
        fits={
            name: _fit(read(f"crosscoders/{name}"), study.null(name)) for name in dict.fromkeys(row["fit"] for row in features)
        },
        features=features,
        checkpoints={
            "accuracy": _joined(tables.CHECKPOINT_ACCURACY, checkpoints),
            "divergence": _joined(tables.CHECKPOINT_DIVERGENCE, checkpoints),
            "samples": _joined(tables.CHECKPOINT_SAMPLES, checkpoints),
        },
        overlap=_joined(tables.OVERLAP, dynamics),
        trajectories=_joined(tables.TRAJECTORIES, dynamics),
        resampled=_joined(tables.BOOTSTRAP, dynamics),
        localize=found,
        scores=tables.SCORES.read(localize),
        sweep=tables.SWEEP.read(localize),
        stitched=tables.STITCHED.read(stitch),
        described=read_json(describe / "features.json"),
        contexts=tables.CONTEXTS.read(describe),
        token_values=tables.TOKEN_VALUES.read(describe),
        probes=tables.PROBES.read(describe),
        **(_interventions(intervened) if found["status"] == "found" else NOT_TESTED),
    )


def _joined(table: Table, folders: list[Path], columns: str = "", **only: Any) -> list[Row]:
    """The rows of one table in every folder; the rest as for ``Table.read``."""
    return [row for folder in folders for row in table.read(folder, columns, **only)]


def _interventions(folders: list[Path]) -> dict[str, Any]:
    """The tables of `intervene`, which writes them where there is a feature set to test."""
    choices = [read_json(folder / "choice.json") for folder in folders]
    return {
        "choice": choices[0] | {"controls": {name: each for choice in choices for name, each in choice["controls"].items()}},
        "search": _joined(tables.SEARCH, folders),
        "effects": _joined(tables.EFFECTS, folders),
        "collateral": _joined(tables.COLLATERAL, folders),
        "sensitivity": _joined(tables.SENSITIVITY, folders),
        "edited": _joined(tables.EDITED_SAMPLES, folders),
        "outcomes": grouped(_joined(tables.OUTCOMES, folders), "control", "set_draw"),
    }


def _model(name: str, read: Callable[..., Path]) -> ModelFacts:
    """The small files beside a model's weights; the weights themselves are neither read nor verified here."""
    wanted = ("config.json", "metrics.json", "audit.json", "curves.csv")
    folder = read(name, *(file for file in wanted if (Path(name) / file).is_file()))
    audit = folder / "audit.json"
    return ModelFacts(
        config=read_json(folder / "config.json"),
        parameters=read_json(folder / "metrics.json").get("parameters", 0),
        audit=read_json(audit) if audit.exists() else {},
        curves=_curves(folder / "curves.csv"),
    )


def _fit(folder: Path, null: bool) -> FitFacts:
    config, metrics = (read_json(folder / f"{name}.json") for name in ("config", "metrics"))
    return FitFacts(config, metrics, _curves(folder / "curves.csv"), null)


def _curves(path: Path) -> Curves:
    """Series of a ``curves.csv`` as (step, value) points; empty cells are steps at which a series was not logged."""
    if not path.exists():
        return {}
    curves: Curves = {}
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            for name, value in row.items():
                if name != "step" and value not in ("", None):
                    curves.setdefault(name, []).append((float(row["step"]), float(value)))
    return curves


def series(curves: Curves, name: str) -> list[tuple[float, float]]:
    """The series called ``name``, whatever group (``train/loss``) its logger put it in."""
    return next((points for key, points in curves.items() if key == name or key.rpartition("/")[2] == name), [])
