"""Plausible artifacts of a whole study in a few seconds: what the report reads, without training.

``write_study(root, Plan(...))`` publishes every folder, its tables through the schemas of the stages. Numbers are drawn from
the pattern of the model organism (base rarely right away from math, GRPO mostly right, SFT right on math only);
the plan turns parts of it off, so that every degenerate study can be written as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featdiff.artifacts import artifact, tables
from featdiff.artifacts.artifact import write_json
from featdiff.attribution.dynamics import overlap_rows, trajectory_rows
from featdiff.attribution.norms import classify
from featdiff.config.params import Study, load_study
from featdiff.intervention.controls import Control, Draws, Setting
from featdiff.intervention.effects import effects, marks, questions_under
from featdiff.intervention.purposes import (
    AMPLIFY_ORIGINAL,
    DIRECTIONS,
    RANDOM_DICTIONARY,
    RIVALS,
    SIDES,
    SINGLE,
    ZERO_CONTRAST,
    ZERO_TUNED,
    Purpose,
    purposes,
    side_of,
)
from featdiff.intervention.search import Searched, edits_tried, gentlest
from featdiff.intervention.study import FEW, Edits, InterventionResult, fewer
from featdiff.language.evaluation import LIKELIHOOD, accuracy_table
from featdiff.localization.localize import Selection, as_json, score_rows
from featdiff.tasks.task import Sample, TaskInfo

STUDY = load_study(Path(__file__).parents[1] / "params.yaml")
EVALUATED = STUDY.evaluate.model_copy(update={"bootstrap": 100})
SET = (118, 311, 640)
CHECKPOINTS = 5
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What the synthetic study looks like."""

    find: tuple[str, ...] = ("reverse", "sort", "last", "double")
    heldout: tuple[str, ...] = ("largest", "shift")
    control: tuple[str, ...] = ("checksum",)
    train: tuple[str, ...] = ("add", "sub", "mul")
    reported: tuple[str, ...] = ()
    likelihood: bool = False
    """Find and held-out tasks are option questions scored by likelihood."""
    status: str = "found"
    """Outcome of localization."""
    joint: bool = True
    """Whether a three-model crosscoder was fitted."""
    arms: tuple[str, ...] = ("sft", "grpo", "rft", "sft_1", "grpo_1")
    contrast: str | None = "sft"
    works: tuple[str, ...] = ("set",)
    """Controls that do what the claims say of the set: bring the answers of the other model."""
    rl_transfers: bool = True
    n: int = 120
    n_features: int = 768
    random_sets: int = 20
    seed: int = 0

    @cached_property
    def roles(self) -> dict[str, str]:
        return {name: role for role in ("train", "find", "control", "heldout", "reported") for name in getattr(self, role)}

    @cached_property
    def study(self) -> Study:
        """The default study with the arms and crosscoders of this one."""
        fits = [
            *(("joint_topk", "joint_l1") if self.joint else ()),
            "null_base",
            *(("null_sft",) if "sft_1" in self.arms else ()),
        ]
        return STUDY.model_copy(
            update={
                "arms": {name: STUDY.arms[name] for name in self.arms},
                "roles": STUDY.roles.model_copy(update={"contrast": self.contrast}),
                "crosscoder": STUDY.crosscoder.model_copy(
                    update={"fits": {name: STUDY.crosscoder.fits[name] for name in fits}}
                ),
                "dynamics": STUDY.dynamics.model_copy(update={"arms": [name for name in self.arms if name in ("sft", "grpo")]}),
            }
        )

    def kind(self, model: str) -> str:
        """What a model behaves like: ``base``, ``sft`` or ``grpo``."""
        method = self.study.arms[model].method if model in self.arms else "base"
        return "grpo" if method == "rft" else method

    def tasks(self) -> list[TaskInfo]:
        found = []
        for name, role in self.roles.items():
            domain, options = (
                "math" if role in ("train", "reported") else "words",
                4 * (self.likelihood and role in ("find", "heldout")),
            )
            scoring = "option_text_norm" if options else "generation"
            found.append(TaskInfo(name, role, domain, scoring, "organism", "strict", False, options, role != "control"))
        return found


@contextmanager
def published(root: Path, name: str) -> Iterator[Path]:
    yield artifact.begin(root / name)
    artifact.publish(root / name)


def _skill(plan: Plan, model: str, task: str, greedy: bool) -> float:
    role, model = plan.roles[task], plan.kind(model)
    if role == "control":
        return 0.1
    if plan.likelihood and role not in ("train", "reported"):
        return {"base": 0.34, "sft": 0.25, "grpo": 0.5 if plan.rl_transfers else 0.34}[model]
    base = (0.05 if role == "train" else 0.03) + (0.0 if greedy else 0.22)
    grpo = 0.96 if task != "largest" else 0.66
    if model == "grpo":
        return grpo if plan.rl_transfers or role == "train" else base
    return base if model == "base" else (0.97 if role == "train" else 0.01)


def _manner(model: str, task: str, role: str, right: bool, rng: np.random.Generator) -> str:
    if model == "sft":
        return "foreign" if role == "train" or rng.random() < 0.3 else ("none" if rng.random() < 0.6 else "direct")
    share = {"base": 0.05, "grpo": 0.97}[model]
    return "steps" if right or rng.random() < share else ("direct" if rng.random() < 0.98 else "none")


def _text(sample: Sample, manner: str, right: bool) -> str:
    answer = sample.answer if right else sample.answer[::-1] + "x"
    return {
        "steps": f"<{','.join(sample.answer)}>{answer}.",
        "foreign": f"({sample.answer[:2]};<b>&amp;)",
        "direct": f"{answer}.",
        "none": "<script>alert('model text')</script>",
        "": answer,
    }[manner]


def _answer_rows(plan: Plan, sample: Sample, model: str, right: bool, rng: np.random.Generator, likelihood: bool) -> Row:
    manner = "" if likelihood else _manner(plan.kind(model), sample.task, plan.roles[sample.task], right, rng)
    text = _text(sample, manner, right)
    correct = bool((right and manner not in ("none", "foreign")) or (right and plan.roles[sample.task] == "train"))
    return {
        "completion": text,
        "parsed": None if manner == "none" else text.rstrip("."),
        "correct": correct,
        "manner": manner,
        "strict": correct,
        "flexible": right,
    }


def write_study(root: Path, plan: Plan) -> Path:
    """Publish every artifact of ``plan`` under ``root``; returns ``root``."""
    rng = np.random.default_rng(plan.seed)
    tasks = plan.tasks()
    samples = _write_data(root, plan, tasks, rng)
    _write_models(root, plan, rng)
    answers = {model: _write_eval(root, plan, tasks, samples, model, rng) for model in plan.study.models}
    _write_checkpoints(root, plan, tasks, samples, rng)
    fits = _write_crosscoders(root, plan, rng)
    _write_attribution(root, plan, fits, rng)
    _write_dynamics(root, plan, rng)
    _write_localize(root, plan, fits, rng)
    _write_stitch(root, plan, samples, np.random.default_rng(plan.seed))
    _write_describe(root, plan, fits, rng)
    _write_intervene(root, plan, tasks, samples, answers, rng)
    return root


def _write_data(root: Path, plan: Plan, tasks: list[TaskInfo], rng: np.random.Generator) -> list[Sample]:
    samples = []
    for task in tasks:
        few = task.role == "reported"
        for split, count in (("find", plan.n * (not few)), ("tune", plan.n // 2 * (not few)), ("report", plan.n)):
            for i in range(count):
                word = "".join(rng.choice(list("abcdefghij"), size=4))
                options = tuple(f"option {letter} of {word}" for letter in "pqrs") if task.options else ()
                facts = (
                    f"{task.name}-{split}-{i:05d}",
                    task.name,
                    split,
                    f"{task.name} {word}=",
                    options[0] if options else word,
                )
                samples.append(Sample(*facts, options))
    with published(root, "data") as out:
        write_json(out / "tasks.json", [asdict(task) for task in tasks])
        tables.EVAL.write(out, [asdict(sample) for sample in samples])
    return samples


def _write_models(root: Path, plan: Plan, rng: np.random.Generator) -> None:
    for model in plan.study.models:
        kind = plan.kind(model)
        with published(root, f"models/{model}") as out:
            config = {"model_type": "qwen3", "num_hidden_layers": 4, "hidden_size": 96, "vocab_size": 60}
            write_json(out / "config.json", config)
            write_json(out / "metrics.json", {"parameters": 450_000} if model == "base" else {})
            steps = np.arange(10, 260, 10)
            progress = 1 - np.exp(-steps / 60)
            noise = rng.normal(0, 0.02, len(steps))
            if kind == "grpo":
                lines = ["step,reward,completion_length,learning_rate"]
                lines += [
                    f"{s},{0.2 + 0.75 * p + e:.4f},{12 + 8 * p:.2f},0.0002"
                    for s, p, e in zip(steps, progress, noise, strict=True)
                ]
            else:
                lines = ["step,loss,learning_rate"] + [
                    f"{s},{2 - 1.7 * p + e:.4f}," for s, p, e in zip(steps, progress, noise, strict=True)
                ]
            (out / "curves.csv").write_text("\n".join(lines) + "\n")
            if model == "base":
                continue
            seen = (12000, 300_000, 188) if kind == "sft" else (32000, 810_000, 250)
            audit: Row = dict(zip(("samples_seen", "tokens_seen", "updates"), seen, strict=True))
            audit |= {"base_manifest": "a" * 64, "problems_sha256": "d" * 64, "problems": 2000}
            audit |= {"checkpoints": [50 * (i + 1) for i in range(CHECKPOINTS)]}
            write_json(out / "audit.json", audit | ({"reward_first": 0.21, "reward_last": 0.95} if kind == "grpo" else {}))


def _write_eval(
    root: Path, plan: Plan, tasks: list[TaskInfo], samples: list[Sample], model: str, rng: np.random.Generator
) -> dict[str, Row]:
    rows, primary = [], {}
    for sample in samples:
        likelihood = plan.likelihood and plan.roles[sample.task] in ("find", "heldout")
        for mode in LIKELIHOOD if likelihood else ("greedy", "sampled"):
            for draw in range(2 if mode == "sampled" else 1):
                right = rng.random() < _skill(plan, model, sample.task, mode != "sampled")
                row = {"sample_id": sample.sample_id, "task": sample.task, "split": sample.split, "mode": mode, "draw": draw}
                rows.append(row | _answer_rows(plan, sample, model, right, rng, likelihood))
                if mode in ("greedy", "option_text_norm"):
                    primary[sample.sample_id] = rows[-1]
    with published(root, f"evals/{model}") as out:
        tables.EVAL_SAMPLES.write(out, rows)
        known = {task.name: task for task in tasks}
        tables.EVAL_ACCURACY.write(out, accuracy_table(rows, known, EVALUATED, plan.seed))
    return primary


def _write_checkpoints(root: Path, plan: Plan, tasks: list[TaskInfo], samples: list[Sample], rng: np.random.Generator) -> None:
    asked = [sample for sample in samples if sample.split == "report" and int(sample.sample_id[-5:]) < 20]
    known = {task.name: task for task in tasks}
    kl = {
        f"{kind}_{part}": value for kind in ("forward", "reverse") for part, value in (("kl", 0.4), ("low", 0.3), ("high", 0.5))
    }
    for arm in plan.arms:
        given, accuracy, distance = list[Row](), list[Row](), list[Row]()
        for checkpoint in range(1, CHECKPOINTS + 1):
            share = checkpoint / CHECKPOINTS
            where = {"arm": arm, "checkpoint": checkpoint, "step": 50 * checkpoint, "share": share}
            answers = []
            for sample in asked:
                skill = [_skill(plan, model, sample.task, True) for model in ("base", arm)]
                right = bool(rng.random() < share * skill[1] + (1 - share) * skill[0])
                facts = {"sample_id": sample.sample_id, "task": sample.task, "split": "report", "mode": "greedy"}
                facts |= {"correct": right, "strict": right, "flexible": right, "manner": "steps", "parsed": "x"}
                answers.append(facts)
                given.append(tables.CHECKPOINT_SAMPLES.kept(where | facts | {"role": plan.roles[sample.task]}))
            table = accuracy_table(answers, known, EVALUATED, plan.seed)
            accuracy += [tables.CHECKPOINT_ACCURACY.kept(where | row) for row in table]
            for task in tasks:
                moved = {"role": task.role, "n": 10} | {key: share * value for key, value in kl.items()}
                distance += [where | moved | {"task": name} for name in (task.name, None)]
        with published(root, f"checkpoints/{arm}") as out:
            tables.CHECKPOINT_SAMPLES.write(out, given)
            tables.CHECKPOINT_ACCURACY.write(out, accuracy)
            tables.CHECKPOINT_DIVERGENCE.write(out, distance)


def _write_crosscoders(root: Path, plan: Plan, rng: np.random.Generator) -> dict[str, Row]:
    fits = {name: {"models": list(fit.slots), "loss": fit.loss} for name, fit in plan.study.fits.items()}
    for name, fit in fits.items():
        with published(root, f"crosscoders/{name}") as out:
            scale = dict.fromkeys(fit["models"], 1.7)
            write_json(
                out / "config.json", fit | {"d_model": 96, "n_features": plan.n_features, "layer": 2, "seed": 0, "scale": scale}
            )
            fve = {model: 0.985 - 0.004 * i - 0.03 * (fit["loss"] == "l1") for i, model in enumerate(fit["models"])}
            l0 = 16.0 if fit["loss"] == "batchtopk" else 31.4
            write_json(out / "metrics.json", {"fve": fve, "l0": l0, "dead_share": 0.03, "tokens_heldout": 6000})
            lines = ["step,loss,l0,dead," + ",".join(f"fve/{model}" for model in fit["models"])]
            for step in range(25, 1501, 25):
                reached = 1 - np.exp(-step / 200)
                values = [
                    60 * (1 - reached) + 3,
                    l0 * (2 - reached),
                    0.03 * reached,
                    *(value * reached for value in fve.values()),
                ]
                lines.append(f"{step}," + ",".join(f"{value + rng.normal(0, 0.002):.4f}" for value in values))
            (out / "curves.csv").write_text("\n".join(lines) + "\n")
    return fits


def _write_attribution(root: Path, plan: Plan, fits: dict[str, Row], rng: np.random.Generator) -> None:
    rows = []
    for name, fit in fits.items():
        models, loss = fit["models"], fit["loss"]
        joint, spread = len(models) == 3, 0.05 if loss == "batchtopk" else 0.16
        for feature in range(plan.n_features):
            dead, own = bool(rng.random() < 0.03) and feature not in SET, rng.random()
            weights = np.abs(1 + rng.normal(0, spread, len(models)))
            if joint:
                often = 1 if loss == "batchtopk" else 4
                weights[1:] *= [8 if own < 0.06 * often else 1, 8 if 0.06 * often <= own < 0.075 * often else 1]
            elif not name.startswith("null"):
                # Spread evenly, so that training runs of one arm count about the same.
                weights[1] *= 8 if (feature * 0.6180339887) % 1 < (0.1 if plan.kind(models[1]) == "sft" else 0.02) else 1
            mas = (weights / weights.sum()).tolist()
            label = "dead" if dead else classify(mas, models, STUDY.attribution)
            told = label in models and loss == "batchtopk" and (not joint or rng.random() < 0.9)
            rate, mean, largest = (float(rng.lognormal(*shape)) for shape in ((-4, 1), (0, 0.5), (1, 0.5)))
            rows.append(
                {
                    "fit": name, "feature_id": feature, "dead": dead, "firing_rate": 0.0 if dead else rate,
                    "mean_activation": mean, "max_activation": largest, "nrn": None if joint else mas[1],
                    "mas": mas if joint else None, "feature_class": label, "tested": not dead,
                    "scaling_owner": label if told else None, "specific": told,
                    "halves_agree": None if dead else bool(rng.random() < 0.95),
                }
            )  # fmt: skip
    with published(root, "analysis/attribution") as out:
        tables.FEATURES.write(out, rows)


def _write_dynamics(root: Path, plan: Plan, rng: np.random.Generator) -> None:
    K = CHECKPOINTS
    for arm in plan.study.dynamics.arms:
        sft = arm == "sft"
        pace, size = (0.04, 2.2) if sft else (0.15, 1.0)
        final = rng.lognormal(-2, 1.2, plan.n_features) * size
        reached = {step: 1 - np.exp(-2.5 * step / K) if sft else step / K for step in range(1, K + 1)}
        changes = {
            step: torch.tensor(final * share * np.exp(rng.normal(0, 0.05 + pace * (K - step), plan.n_features)))
            for step, share in reached.items()
        }
        floor = changes[K], changes[K] * torch.tensor(np.exp(rng.normal(0, 0.05, plan.n_features)))
        resampled = [
            {"arm": arm, "checkpoint": step, "draw": draw, "overlap": 0.95 - pace * (K - step) + noise, "ceiling": 0.95,
             "chance": 0.04, "change": size * reached[step] * (1 + noise)}
            for step in changes for draw, noise in enumerate([0.0, *rng.normal(0, 0.02, 50)])
        ]  # fmt: skip
        with published(root, f"analysis/dynamics/{arm}") as out:
            overlap = [row for how in ("fixed", "refit") for row in overlap_rows(arm, how, changes, floor, [10, 25, 50])]
            tables.OVERLAP.write(out, overlap)
            tables.TRAJECTORIES.write(out, trajectory_rows(arm, changes))
            tables.BOOTSTRAP.write(out, resampled)


def _write_localize(root: Path, plan: Plan, fits: dict[str, Row], rng: np.random.Generator) -> None:
    found, sought = plan.status == "found", plan.status != "too_few_flipped"
    features, params = list(SET) if found else [], STUDY.localize.model_copy(update={"fit": next(iter(fits))})
    scores = {task: rng.exponential(0.05, plan.n_features) for task in plan.find if sought}
    per_task = {}
    for task, values in scores.items():
        values[features] = rng.uniform(0.5, 1.6, len(features))
        selected = np.flatnonzero(values >= 0.2 * values.max()).tolist()
        per_task[task] = {"n_flipped": 93, "max_score": float(values.max()), "selected": selected}
    selection = Selection(
        status=plan.status,
        features=features,
        threshold=0.2,
        per_task=per_task,
        skipped={} if sought else dict.fromkeys(plan.find, "4 flipped samples, 10 needed"),
        expected_intersection=0.0021,
        frequency={k: 0.98 - 0.1 * i for i, k in enumerate(features)},
        overlap={a: {b: 1.0 if a == b else 0.4 for b in per_task} for a in per_task},
        scores=scores,
        task_frequency={task: np.clip(values / values.max() * 2, 0, 1) for task, values in scores.items()},
    )
    by_chance = {"expected_independent": 0.002, "expected_shuffled": 0.4, "p_shuffled": 1 / 201}
    sizes = {0.1: 9, 0.2: len(features), 0.4: 2} if sought else {}
    sweep = [{"threshold": bound, "size": n, "jaccard": 1.0 if bound == 0.2 else 0.5} | by_chance for bound, n in sizes.items()]
    with published(root, "analysis/localize") as out:
        facts = {"seeds": _seeds(), "variants": [], "shuffled": list(SET), "random_dictionary": None} if sought else {}
        write_json(out / "features.json", as_json(selection, params) | facts)
        tables.SWEEP.write(out, sweep)
        tables.SCORES.write(out, score_rows(selection))


def _write_stitch(root: Path, plan: Plan, samples: list[Sample], rng: np.random.Generator) -> None:
    """Blocks of the model that is above count for half of its skill at every depth."""
    asked, rows = [sample for sample in samples if sample.split == "report"][::2], []
    for lower, depth in product(("original", "tuned"), (1, 2, 3)):
        for sample in asked:
            skills = {part: _skill(plan, model, sample.task, True) for part, model in (("original", "base"), ("tuned", "grpo"))}
            facts = {"lower": lower, "depth": depth, "task": sample.task, "sample_id": sample.sample_id, "manner": "steps"}
            rows.append(facts | {"correct": bool(rng.random() < np.mean(list(skills.values())))})
    with published(root, "analysis/stitch") as out:
        tables.STITCHED.write(out, rows)
        write_json(out / "metrics.json", {})


def _seeds() -> Row:
    sets = {"joint_topk": list(SET), "joint_topk_1": [1, 2, 3]}
    partners = {str(k): {"joint_topk_1": {"feature": 2, "cosine": 0.9, "selected": True}} for k in SET}
    return {
        "sets": sets,
        "jaccard": {"joint_topk · joint_topk_1": 0.8},
        "mean_jaccard": 0.8,
        "partners": partners,
        "effect": {"joint_topk · joint_topk_1": {"mean_change": 0.97, "per_question": 0.91}},
        "mean_effect": 0.97,
        "mean_difference": dict.fromkeys(sets, 0.6),
        "subspace": {
            "joint_topk · joint_topk_1": {"decoder": 0.83, "decoder_random": 0.14, "change": 0.9, "change_random": 0.1}
        },
        "mean_subspace": 0.83,
    }


def _near(value: float, spread: float = 0.05, n: int = 400) -> Row:
    return {"value": value, "low": max(0.0, value - spread), "high": value + spread, "n": n}


def _judged(told: float) -> Row:
    shares = {"steps": _near(0.3), "precision": _near(0.6), "recall": _near(0.9)}
    return {"prompts": 400, "fires": 250, **shares, "auroc": _near(told), "auroc_within_tasks": _near(told - 0.01)}


def probe_rows() -> list[Row]:
    """The original's own answers are too few of one manner; in several models the whole stream reads it, as do five features
    and one direction; a random dictionary does not. In texts nothing reads it."""
    ends = ("auc", "accuracy", "minus_dense")
    measured = [f"{name}{end}" for name in ends for end in ("", "_low", "_high")]
    probes = {"dense": 0.0, "features_1": -0.2, "features_5": -0.01, "random_1": -0.4, "random_5": -0.3, "set": -0.02}
    rows = []
    for of, models, steps, dense in (
        ("answers", "original", 0.04, None),
        ("answers", "tuned", 0.97, None),
        ("answers", "original + tuned", 0.5, 0.98),
        ("texts", "original", 0.5, 0.52),
    ):
        facts = {"of": of, "models": models, "n": 1200, "steps": steps, "tasks": 11}
        if dense is None:
            rows.append(facts | {"tasks": 1, "reason": "too few of one label"} | dict.fromkeys(["probe", "columns", *measured]))
            continue
        for probe, less in (probes | {"mean_difference": 0.0}).items():
            row = facts | {"reason": "", "probe": probe, "columns": {"dense": 96, "features_5": 5, "set": 3}.get(probe, 1)}
            for name, value in zip(ends, (dense + less, dense + less - 0.05, less), strict=True):
                spread = 0.04 * (name != "minus_dense" or probe != "dense")
                row |= {name: value, f"{name}_low": value - spread, f"{name}_high": min(1.0, value + spread)}
            rows.append(row)
    return rows


def _write_describe(root: Path, plan: Plan, fits: dict[str, Row], rng: np.random.Generator) -> None:
    found = SET if plan.status == "found" else ()
    generated = not plan.likelihood
    features, contexts, shaded = [], [], []
    for s, k in enumerate(found):
        for task in plan.roles:
            values = [0.0, 4.5, float(s), 9.0]
            for sample_id in (f"{task}-report-00000", f"{task}-report-00001"):
                shaded.append(
                    {
                        "feature_id": k, "sample_id": sample_id, "answer_from": 3, "tokens": ["a", "b", "=", "<i>"],
                        "tuned": values, "original": [value / 2 for value in values],
                    }
                )  # fmt: skip
        verdict = ("context", "token", "untested")[s]
        planted = {"original": _near(8.0), "planted": _near(0.8 + 7 * s), "ratio": _near(0.1 + 0.85 * s), "rate": _near(0.2)}
        token = {"token_id": 5, "token": "=", "verdict": verdict, "natural": _near(0.6), **planted}
        features.append(
            {
                "feature_id": k, "largest": 9.0, "corpus_rate": {"original": 0.04, "tuned": 0.06},
                "histogram": {"upper": 9.0, "original": [40, 9, 0], "tuned": [50, 20, 3 + s]}, "alike": [],
                "positions": [
                    {
                        "model": model, "position": position, "task": task,
                        "value": _near(float(rng.uniform(0, 5))), "rate": _near(float(rng.uniform(0, 0.9))),
                    }
                    for model in ("original", "tuned")
                    for position in ("prompt", "prompt_last", "answer_first", "answer_rest")
                    for task in (None, *(plan.roles if position == "prompt_last" else ()))
                ],
                "lexical": {"verdict": verdict, "silent": 60 * (s != 1), "tokens": [token] if verdict != "untested" else []},
                "manner": {
                    "answers": {model: _judged(0.5) for model in ("original", "tuned")} if generated else {},
                    "texts": {model: _judged(0.95) for model in ("original", "tuned")} if generated else {},
                },
                "promoted": [{"token_id": i, "token": token, "logit": 2.0 - i} for i, token in enumerate(("<b>", " the"))],
                "suppressed": [{"token_id": 9, "token": "\n", "logit": -1.5}],
                "more_likely": [{"token_id": 0, "token": "<b>", "change": _near(0.4), "before": 0.2, "after": 0.6}],
                "less_likely": [
                    {"token_id": i, "token": token, "change": _near(-drop), "before": 0.3, "after": 0.3 - drop}
                    for i, (token, drop) in enumerate((("&amp;", 0.25), ("unmoved", 0.001)))
                ],
            }
        )  # fmt: skip
        for source in ("corpus", *plan.roles):
            for rank in (1, 2):
                tokens = [*"sort ab=", "</script>", "<i>", "x"]
                values = [0.0] * 7 + [float(rng.uniform(4, 9)) / rank, 0.5, 0.0, 0.0]
                contexts.append(
                    {
                        "feature_id": k, "source": source, "rank": rank,
                        "quantile": 0.5 if (source, rank) == ("corpus", 2) else None, "text": f"{source}-{rank}", "peak": 7,
                        "answer_from": None if source == "corpus" else 8, "tokens": tokens,
                        "tuned": values, "original": [value / 2 for value in values],
                    }
                )  # fmt: skip
    told = features[0]["manner"] if features else {"answers": {}, "texts": {}}
    facts = {"status": plan.status, "fit": next(iter(fits)), "readout": "swap", "prompts": 10 * plan.n * bool(found)}
    corpus = {"corpus_tokens": 120_000 * bool(found), "corpus_texts": 2000 * bool(found)}
    with published(root, "analysis/describe") as out:
        write_json(out / "features.json", {**facts, **corpus, "features": features, "set": {"manner": told}})
        tables.CONTEXTS.write(out, contexts)
        tables.TOKEN_VALUES.write(out, shaded)
        tables.PROBES.write(out, probe_rows() if found and generated else [])
        write_json(out / "metrics.json", {})


STRENGTH = {
    "mean_difference": 0.2,
    "first_component": 0.1,
    "set_change": 0.25,
    "random_dictionary": 0.15,
    "reconstruction": 0.02,
    "noop": 0.0,
    "alone": 0.7,
}
"""What controls but random ones do per dose, as a share of the way to the model that the edited one is to become like."""
NORM = {"transplant": 0.4, "add": 0.5, "zero": 0.8, "scale": 0.8}
"""‖Δh‖ / ‖h‖ at dose 1."""
DOSES, BEYOND, MOST = (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0), 4.0, 0.97


def _share(plan: Plan, purpose: Purpose, control: str, number: int, setting: Setting) -> float:
    """How far an edit brings a model to the answers of ``purpose.toward``."""
    if purpose.name == ZERO_CONTRAST or setting.positions == "generated":
        return 0.0
    weak = STRENGTH.get(control, 0.01 * (1 + number % 3))
    strength = 2.0 if control in plan.works or (control == "without" and plan.works) else weak
    return min(MOST, strength * setting.dose * (0.1 if setting.edit == "scale" else 1.0))


def _searched(plan: Plan, purpose: Purpose, controls: list[Control], tune: dict[str, tuple[float, float]]) -> Searched:
    """The search on the tune split: ``tune`` has accuracy of the edited model and of the one that it is to become like."""
    rows: list[Row] = []
    chosen: dict[str, Setting] = {}
    effects_of_set: dict[Setting, float] = {}
    params, setting = STUDY.intervene, Setting("", "prompt_last", 0.0)
    for control in controls:
        if control.name in SINGLE:
            chosen[control.label] = setting
            continue
        edits = edits_tried(purpose, params) if control.name == "set" else [setting.edit]
        tried = [Setting(edit, place, dose) for edit in edits for place in params.positions for dose in DOSES]
        value = {each: _share(plan, purpose, control.name, control.number, each) for each in tried}
        own = chosen[control.label] = gentlest(value, NORM, params.most_of_effect, params.positions)
        if control.name == "set":
            setting, effects_of_set = own, value
        for each in (setting._replace(dose=0.0), *tried, setting._replace(dose=BEYOND)):
            share = _share(plan, purpose, control.name, control.number, each)
            facts = {"purpose": purpose.name, "control": control.name, "set_draw": control.number} | each._asdict()
            facts |= {"norm": NORM[each.edit] * each.dose, "acting": 1.0 * (each.dose > 0), "unscaled": 0.4}
            facts |= {"role": "find", "n": 12, "steps": 0.5, "unread": 0.02, "chosen": each == own}
            rows += [facts | {"task": task, "accuracy": a + share * (b - a)} for task, (a, b) in tune.items()]
    return Searched(controls, chosen, effects_of_set, rows)


def _write_intervene(
    root: Path,
    plan: Plan,
    tasks: list[TaskInfo],
    samples: list[Sample],
    answers: dict[str, dict[str, Row]],
    rng: np.random.Generator,
) -> None:
    """Under an edit a share of the answers is that of the model which the edited one is to become like (:func:`_share`)."""
    if plan.status != "found":
        for side in SIDES:
            with published(root, f"analysis/intervene/{side}") as out:
                write_json(out / "metrics.json", {"status": plan.status})
        return
    study = plan.study
    report = [sample for sample in samples if sample.split == "report" and plan.roles[sample.task] != "reported"]
    params = study.intervene.model_copy(update={"bootstrap": 100})
    directions = {name: torch.eye(8)[i] for i, name in enumerate(DIRECTIONS)}
    shares_FM, length_QF = rng.dirichlet([1, 1, 1], plan.n_features), rng.exponential(size=(8, plan.n_features))
    draws = Draws(
        plan.random_sets,
        5,
        params.single_features,
        shares_FM,
        0,
        [5, 6, 7],
        directions,
        plan.seed,
        Control(RANDOM_DICTIONARY, 0, (1, 2, 3)),
    )
    right = {model: {key for key, row in rows.items() if row["correct"]} for model, rows in answers.items()}
    searched: dict[str, Searched] = {}
    kept, table, spilled, outcomes = list[Row](), list[Row](), list[Row](), list[Row]()
    for purpose in purposes(study.roles, study.repeats(study.roles.tuned)):
        own, toward = answers[purpose.model], answers[purpose.toward]
        if purpose.chosen:
            tune = {}
            for task in plan.find:
                ids = [sample.sample_id for sample in samples if (sample.task, sample.split) == (task, "tune")]
                before, after = (
                    sum(key in right[model] for key in ids) / len(ids) for model in (purpose.model, purpose.toward)
                )
                tune[task] = (before, after)
            searched[purpose.name] = _searched(plan, purpose, draws.controls(SET, purpose.sign, length_QF), tune)
        source = searched[purpose.name if purpose.chosen else ZERO_TUNED]
        made: Edits = {(name, 0): None for name in ("none", "noop", "reconstruction")}
        made |= {(each.name, each.number): None for each in source.controls}
        made = made if purpose.chosen else fewer(made, params.other_draws)
        marked, nats, few = {}, {}, fewer(made, FEW)
        for control, number in made:
            setting = source.chosen.get(f"{control} {number}", source.setting)
            share = 0.0 if control == "none" else _share(plan, purpose, control, number, setting)
            asked = questions_under(control, report, params)
            moved = rng.random(len(asked)) < share
            rows = [(toward if far else own)[sample.sample_id] for sample, far in zip(asked, moved, strict=True)]
            marked[control, number] = marks(rows, toward)
            facts = {"purpose": purpose.name, "model": purpose.model, "control": control, "set_draw": number}
            outcomes += [tables.OUTCOMES.kept(facts | row) for row in rows]
            if control in ("none", "set", *RIVALS):
                kept += [facts | row for row in rows]
            if (control, number) in few:
                changed = 0.0 if control in ("none", "noop") else 0.02
                spilled.append(facts | {"perplexity": 4.0, "change": changed, "low": -0.01, "high": 0.05, "n": 40})
                nats[control, number] = {
                    row["sample_id"]: [0.2 if row["correct"] else 1.5, 0.1] for row in rows if row["mode"] == "greedy"
                }
        unread = {task.name: float(np.mean([row["parsed"] is None for row in toward.values() if row["task"] == task.name]))
                  for task in tasks}  # fmt: skip
        flipped = right[study.roles.tuned] - right[study.roles.original]
        known = {task.name: task for task in tasks}
        table += effects(purpose, marked, nats, report, flipped, unread, known, params, plan.seed)
    for side in SIDES:
        _write_side(root, plan, side, searched, kept, table, spilled, outcomes)


def _write_side(
    root: Path,
    plan: Plan,
    side: str,
    searched: dict[str, Searched],
    kept: list[Row],
    table: list[Row],
    spilled: list[Row],
    outcomes: list[Row],
) -> None:
    """What the stage of one side publishes of the whole."""
    searched = {name: each for name, each in searched.items() if side_of(name) == side}
    kept, table, spilled, outcomes, tried = (
        [row for row in rows if side_of(row["purpose"]) == side] for rows in (kept, table, spilled, outcomes, _sensitivity())
    )
    chosen = {
        name: [
            {"control": each.name, "set_draw": each.number, "features": list(each.features)}
            | found.chosen[each.label]._asdict()
            for each in found.controls
        ]
        for name, found in searched.items()
    }
    search = [row for each in searched.values() for row in each.rows]
    columns = {name: [row[name] for row in outcomes] for name in tables.OUTCOMES.columns}
    choice = {"features": list(SET), "controls": chosen}
    with published(root, f"analysis/intervene/{side}") as out:
        write_json(out / "metrics.json", {"status": plan.status})
        InterventionResult(choice, search, kept, table, spilled, columns, searched).save(out, sensitivity=tried)


def _sensitivity() -> list[Row]:
    rows = []
    for purpose, effect in ((ZERO_TUNED, -0.8), (AMPLIFY_ORIGINAL, 0.8)):
        facts = {"purpose": purpose, "size": 5, "edit": "transplant", "positions": "prompt_last", "dose": 0.5, "random": 0.1}
        facts |= {"median": 0.0, "effect": effect}
        rows.append(facts | {"varied": "found by", "choice": "swap at prompt_last"})
        nothing = {"size": 0, "effect": None, "random": None, "median": None}
        rows.append(facts | {"varied": "found by", "choice": "slot at all"} | nothing)
        rows.append(facts | {"varied": "found in", "choice": "joint_topk_1"} | {"random": None, "median": None})
        rows.append(facts | {"varied": "edited by", "choice": "add at all", "effect": 0.0})
    return rows
