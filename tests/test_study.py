"""The intervention study on real models, one of which has a planted direction that makes it work step by step."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from featdiff.config.models import Roles
from featdiff.config.sets import InterveneParams
from featdiff.crosscoder.edits import AsLong, Editor, FeatureEdit, Push
from featdiff.crosscoder.model import Crosscoder
from featdiff.intervention import study
from featdiff.intervention.controls import Control, Draws, Setting
from featdiff.intervention.models import EditableModel, EditableModels
from featdiff.intervention.purposes import AMPLIFY_ORIGINAL, DIRECTIONS, SIDES, ZERO_TUNED, purposes
from featdiff.intervention.search import Job, Searched
from featdiff.intervention.sensitivity import DRAWS, Otherwise, cases, sensitivity
from featdiff.intervention.study import (
    FEW,
    InterventionResult,
    Questions,
    answer,
    chunks,
    collateral,
    edits,
    fewer,
    intervene,
    reading,
)
from featdiff.language.evaluation import Evaluator
from featdiff.language.models import save_model
from featdiff.language.session import PromptCache
from featdiff.pipeline.checkpoint import Scratch
from featdiff.report import evidence
from featdiff.report.selectivity import curves, selectivity
from featdiff.tasks.task import Sample, TaskInfo, Text, first_of_each
from tiny import params_of, random_crosscoder, tiny_model

T = TypeVar("T")
Row = dict[str, Any]
WORDS = TaskInfo("words", "find", "words", "generation", "organism", "strict", False, 0)
LATE = replace(WORDS, name="late", role="heldout")
QUIZ = TaskInfo("quiz", "heldout", "questions", "option_text_norm", "letter", "strict", False, 3)
TASKS = {task.name: task for task in (WORDS, LATE, QUIZ)}
CPU = torch.device("cpu")
ROLES = Roles(original="before", tuned="after", contrast="other")
ZEROED, CONTRASTED, AMPLIFIED, REPEATED = purposes(ROLES, ["after", "after_1"])
HELD = ("before", "other", "after")
"""Models of the crosscoder; the repeat is none of them."""
EVERY = ["zero_tuned", "zero_contrast", "amplify_original", "repeat_after_1"]
BY_SIDE = ["zero_tuned", "zero_contrast", "repeat_after_1", "amplify_original"]
"""In the order in which the two stages write them."""
SET = [0, 1]
GAIN, NOISE = 1, slice(7, 16)
"""Coordinates of the residual stream: what the tuned model has more, and what differs from question to question."""


once = Scratch().parts


def params(**changes: Any) -> InterveneParams:
    small = {
        "positions": ["prompt_last", "generated", "all"], "remove": ["transplant", "zero"], "amplify": ["add", "transplant"],
        "doses": [0.25, 1.0], "random_sets": 20, "random_directions": 3, "other_draws": 4, "control_questions": 2,
        "single_features": 2, "tolerance": 0.05, "bootstrap": 300, "max_new_tokens": 8, "batch_size": 200,
    }  # fmt: skip
    return params_of(InterveneParams, "intervene", **small | changes)


def samples() -> list[Sample]:
    made = []
    for split, number in (("find", 1), ("tune", 3), ("report", 4)):
        for i in range(number):
            for task in ("words", "late"):
                made.append(Sample(f"{task}-{split}-{i}", task, split, f"{task[: i + 1]} {'dfgh'[i]}=", "b"))
            made.append(Sample(f"quiz-{split}-{i}", "quiz", split, f"who {i}=", "C", ("red", "blue", "green")))
    return made


QUESTIONS = Questions(TASKS, samples(), [Text(f"rev {'abc'[:i]}=", "cba", "t") for i in (1, 2, 3)])


def test_a_task_that_is_only_reported_is_asked_under_no_edit() -> None:
    tasks = TASKS | {"late": replace(LATE, role="reported")}
    assert {sample.task for sample in Questions(tasks, samples(), []).report} == {"words", "quiz"}
    assert {sample.task for sample in QUESTIONS.report} == set(TASKS)


def planted(seed: int, gain: float) -> Any:
    """A model in which each token says what comes next: after ``=`` it is ``c.``, and with ``gain`` in its coordinate it is
    ``<a>b.``, which is right. The first block adds what no answer depends on, from all of the question."""
    model, tokenizer = tiny_model(seed)
    coordinate = {"=": 0, "<": 2, "a": 3, ">": 4, "b": 5, "c": 5, ".": 6}
    follows = {"c": (0, 1.0), "<": (GAIN, 0.9), "a": (2, 1.0), ">": (3, 1.0), "b": (4, 1.0), ".": (5, 1.0)}
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, : NOISE.start] = 0
        embedding[:, NOISE] = torch.nn.functional.normalize(embedding[:, NOISE])  # that of padding is zero
        head = Parameter(torch.zeros_like(embedding))
        for token, place in coordinate.items():
            embedding[tokenizer.convert_tokens_to_ids(token)] = 2 * torch.eye(16)[place]
        embedding[tokenizer.convert_tokens_to_ids("="), GAIN] = gain
        for token, (place, weight) in follows.items():
            head[tokenizer.convert_tokens_to_ids(token), place] = weight
        head[tokenizer.eos_token_id, coordinate["."]] = 1.0
        for i, each in enumerate(model.model.layers):
            each.mlp.down_proj.weight.zero_()
            each.self_attn.o_proj.weight[: NOISE.start if i == 0 else None] = 0
    model.lm_head.weight, model.config.tie_word_embeddings = head, False
    return model, tokenizer


SEEDS = {"before": (0, 0.0), "other": (1, 0.0), "after": (2, 4.0), "after_1": (3, 4.0)}


def dictionary(seed: int = 0) -> Crosscoder:
    """Two features that share the planted coordinate, and others that fire on the rest."""
    crosscoder = Crosscoder(list(HELD), 16, 24, "l1").requires_grad_(False)
    rows_FD = torch.zeros(24, 16)
    rows_FD[2:, NOISE] = torch.randn(22, 9, generator=torch.Generator().manual_seed(seed))
    rows_FD[SET, GAIN] = 1
    rows_FD /= rows_FD.norm(dim=1, keepdim=True)
    share_F1 = torch.ones(24, 1)
    share_F1[SET] = torch.tensor([[0.6], [0.4]])
    crosscoder.W_enc[:] = rows_FD.T / len(HELD)
    crosscoder.W_dec[:] = (rows_FD * share_F1)[:, None]
    crosscoder.W_dec[SET, HELD.index("other")] = 0
    crosscoder.b_enc[2:] = 1.5
    return crosscoder


def maker(name: str = "after", seed: int = 0) -> Editor:
    largest_F = torch.full((24,), 4.0)
    return Editor(dictionary(seed), name, 1, CPU, largest_F, donor_name="before")


def drawn(p: InterveneParams) -> Draws:
    directions = dict(zip(DIRECTIONS, torch.eye(16)[[GAIN, 8, GAIN]] * 4, strict=True))
    shares_FM = np.random.default_rng(0).dirichlet(np.ones(3), 24)
    return Draws(p.random_sets, p.random_directions, p.single_features, shares_FM, 0, (), directions, 0)


class Parts:
    """Keeps every part of the work as JSON, gives those of an earlier run back, and refuses a name that comes twice."""

    def __init__(self, earlier: dict[str, str] | None = None) -> None:
        self.earlier, self.kept = earlier or {}, dict[str, str]()
        self.computed = list[str]()

    def __call__(self, jobs: Sequence[Job[T]], done: Callable[[str], object] = lambda _: None, /) -> list[Any]:
        return [self._one(*job) for job in jobs]

    def _one(self, name: str, compute: Callable[[], T]) -> Any:
        assert name not in self.kept, f"{name} names two parts"
        if name in self.earlier:
            self.kept[name] = self.earlier[name]
            return json.loads(self.earlier[name])
        self.computed.append(name)
        value = compute()
        self.kept[name] = json.dumps(value)
        return value


class Done(NamedTuple):
    """A whole study, and what of it was kept."""

    models: EditableModels
    result: InterventionResult
    tried: list[Row]
    parts: Parts


OTHERWISE = Otherwise(
    [
        {"readout": "swap", "positions": "prompt_last", "features": [0]},
        {"readout": "slot", "positions": "all", "features": []},
        {"readout": "slot", "positions": "prompt_last", "features": list(range(13))},
    ],
    {"seed_1": [0, 1], "seed_2": [4, 5]},
    {"seed_1": maker("other", seed=1), "seed_2": maker("other", seed=2)},
)


def whole(root: Path, once: Parts) -> Done:
    for name, (seed, gain) in SEEDS.items():
        if not (root / name).exists():
            save_model(*planted(seed, gain), root / name)
    asked = purposes(ROLES, ["after", "after_1"])
    models = EditableModels({purpose: root / purpose.model for purpose in asked}, maker(), TASKS, params())
    results = [intervene(models, side, drawn(params()), SET, QUESTIONS, params(), 0, once) for side in SIDES]
    tried = [sensitivity(models, result, OTHERWISE, QUESTIONS.tune, 0, once) for result in results]
    return Done(models, _together(*results), [row for rows in tried for row in rows], once)


def _together(one: InterventionResult, other: InterventionResult) -> InterventionResult:
    return InterventionResult(
        choice=one.choice | {"controls": one.choice["controls"] | other.choice["controls"]},
        search=one.search + other.search,
        samples=one.samples + other.samples,
        effects=one.effects + other.effects,
        collateral=one.collateral + other.collateral,
        outcomes={name: one.outcomes[name] + other.outcomes[name] for name in one.outcomes},
        searched=one.searched | other.searched,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return whole(tmp_path_factory.mktemp("study"), Parts())


def rows_of(table: list[Row], **wanted: Any) -> list[Row]:
    found = [row for row in table if wanted.items() <= row.items()]
    assert found, wanted
    return found


def test_the_planted_set_is_necessary_and_sufficient_and_random_sets_as_long_do_nothing(done: Done) -> None:
    for purpose, sign, before in ((ZERO_TUNED, -1, 1.0), (AMPLIFY_ORIGINAL, 1, 0.0)):
        for task in ("words", "late"):
            (row,) = rows_of(done.result.effects, purpose=purpose, control="set", task=task, subset="all")
            assert (row["effect"], row["baseline"], row["n"]) == (sign, before, 4)
            assert (row["beyond_random"], row["p_random"]) == (True, 1 / 21)
            assert (row["alike"], row["alike_baseline"]) == (1, 0), "answers like those of the other model"
            assert row["unread"] == row["unread_toward"] == 0, "and not broken ones"
            assert (row["steps"], row["steps_baseline"]) == ((0, 1) if sign < 0 else (1, 0))
            assert [
                each["effect"]
                for each in rows_of(done.result.effects, purpose=purpose, control="random", task=task, subset="all")
            ] == [0] * 20
            for direction, effect in (("mean_difference", sign), ("set_change", sign), ("first_component", 0)):
                (line,) = rows_of(done.result.effects, purpose=purpose, control=direction, task=task, subset="all")
                assert line["effect"] == effect, "one direction does as much, another nothing"
        assert done.result.searched[purpose].setting[1:] == ("prompt_last", 1.0)
        for row in rows_of(done.result.search, purpose=purpose, control="random", chosen=True):
            assert row["acting"] >= 0.9
            assert row["norm"] > 0


def test_the_contrast_has_nothing_to_lose_and_the_repeat_as_much_as_the_tuned_model(done: Done) -> None:
    for purpose, effect in (("zero_contrast", 0), ("repeat_after_1", -1)):
        (row,) = rows_of(done.result.effects, purpose=purpose, control="set", task="words", subset="all")
        assert row["effect"] == effect
        draws = [
            row["set_draw"]
            for row in rows_of(done.result.effects, purpose=purpose, control="random", task="words", subset="all")
        ]
        assert draws == list(range(params().other_draws)), "fewer draws, the first ones"
        assert not [row for row in done.result.effects if row["purpose"] == purpose and row["control"] in ("alone", "without")]


def test_the_no_op_changes_nothing(done: Done) -> None:
    for row in rows_of(done.result.effects, control="noop"):
        assert row["effect"] == 0
        assert row["start_nats"] in (0, None)
    for row in rows_of(done.result.collateral, control="noop"):
        assert (row["change"], row["low"], row["high"]) == (0, 0, 0)


def test_nothing_is_chosen_on_the_report_split_and_all_of_it_is_answered(done: Done) -> None:
    assert {row["task"] for row in done.result.search} == {"words"}
    assert {row["n"] for row in rows_of(done.result.search, control="set")} == {3}
    assert {row["n"] for row in rows_of(done.result.search, control="random")} == {params().control_questions}
    assert {row["purpose"] for row in done.result.search} == {ZERO_TUNED, AMPLIFY_ORIGINAL}
    assert list(dict.fromkeys(row["purpose"] for row in done.result.samples)) == BY_SIDE
    assert {row["split"] for row in done.result.samples} == {"report"}
    assert {row["control"] for row in done.result.samples} == {"none", "noop", "set", *DIRECTIONS}
    assert len(done.result.samples) == len(EVERY) * (3 + len(DIRECTIONS)) * 12
    assert {row["task"] for row in done.result.effects} == set(TASKS)


def test_the_flipped_subset_is_the_same_for_every_purpose(done: Done) -> None:
    right = {
        purpose: {row["sample_id"] for row in rows_of(done.result.samples, purpose=purpose, control="none") if row["correct"]}
        for purpose in (ZERO_TUNED, AMPLIFY_ORIGINAL)
    }
    flipped = right[ZERO_TUNED] - right[AMPLIFY_ORIGINAL]
    for purpose in EVERY:
        rows = rows_of(done.result.effects, purpose=purpose, control="set", subset="flipped")
        wanted = {task: sum(key.startswith(task) for key in flipped) for task in TASKS}
        assert {row["task"]: row["n"] for row in rows} == {task: n for task, n in wanted.items() if n}
        assert wanted["words"] == wanted["late"] == 4 > wanted["quiz"]
    assert right[AMPLIFY_ORIGINAL], "the original solves some, which are not flipped"


def test_likelihood_says_that_the_start_is_what_the_set_decides(done: Done) -> None:
    for purpose, way in ((ZERO_TUNED, 1), (AMPLIFY_ORIGINAL, -1)):
        (row,) = rows_of(done.result.effects, purpose=purpose, control="set", task="words", subset="all")
        assert way * row["start_nats"] > 0
        assert row["start_nats_low"] <= row["start_nats"] <= row["start_nats_high"]
    measured = {(row["control"], row["set_draw"]) for row in done.result.effects if row["start_nats"] is not None}
    assert {draw for control, draw in measured if control == "random"} == set(range(FEW))
    assert not [row for row in rows_of(done.result.effects, task="quiz") if row["start_nats"] is not None]


def test_every_control_has_a_chosen_setting_of_its_own(done: Done) -> None:
    for purpose in (ZERO_TUNED, AMPLIFY_ORIGINAL):
        listed = done.result.choice["controls"][purpose]
        made = {(row["control"], row["set_draw"]) for row in rows_of(done.result.effects, purpose=purpose)}
        assert {(row["control"], row["set_draw"]) for row in listed} | {("noop", 0), ("reconstruction", 0)} == made
        assert {row["edit"] for row in listed} == {done.result.searched[purpose].setting.edit}
    assert done.result.choice["features"] == SET


def test_what_the_stage_writes_is_what_the_report_reads(done: Done, tmp_path: Path) -> None:
    done.result.save(tmp_path, sensitivity=done.tried)
    read = evidence._interventions([tmp_path])
    assert {name: len(table) for name, table in read.items() if name not in ("choice", "outcomes")} == {
        "search": len(done.result.search), "effects": len(done.result.effects), "collateral": len(done.result.collateral),
        "sensitivity": len(done.tried), "edited": len(done.result.samples),
    }  # fmt: skip
    assert read["choice"] == done.result.choice
    kept = {(row["purpose"], row["sample_id"]): row["correct"] for row in read["outcomes"]["set", 0]}
    assert kept == {(r["purpose"], r["sample_id"]): r["correct"] for r in done.result.samples if r["control"] == "set"}
    (row,) = rows_of(read["effects"], purpose=ZERO_TUNED, control="set", task="words", subset="all")
    assert row["effect"] == -1
    known: Any = evidence.Evidence.__new__(evidence.Evidence)
    vars(known).update(search=read["search"], choice=read["choice"])
    for purpose in (ZERO_TUNED, AMPLIFY_ORIGINAL):
        drawn = curves(known, purpose)
        assert (len(drawn["set"]), len(drawn["random"]), len(drawn["random_direction"])) == (1, 20, 3)
        assert drawn["set"][0][0] == (0, 0)
        assert max(gain for _, gain in drawn["set"][0]) == 1
        np.testing.assert_allclose(drawn["mean_difference"][0], drawn["set"][0], rtol=1e-5)
        found = selectivity(known, purpose)["random"]
        assert not found.reached, "random sets never do as much"
        assert found.ratio > 2


def test_the_summary_is_json_and_has_every_purpose_and_task(done: Done) -> None:
    summary = json.loads(json.dumps(done.result.summary(), allow_nan=False))
    assert list(summary) == BY_SIDE
    assert set(summary[ZERO_TUNED]) == set(TASKS)
    assert (summary[ZERO_TUNED]["words"]["effect"], summary[ZERO_TUNED]["words"]["alike"]) == (-1, 1)


def test_what_is_done_otherwise(done: Done) -> None:
    tried = {(row["purpose"], row["varied"], row["choice"]): row for row in done.tried}
    assert len(tried) == len(done.tried)
    for purpose, sign in ((ZERO_TUNED, -1), (AMPLIFY_ORIGINAL, 1)):
        chosen = done.result.searched[purpose].setting
        assert tried[purpose, "found in", "seed_1"]["effect"] == sign, "the same features of another crosscoder"
        assert tried[purpose, "found in", "seed_2"]["effect"] == 0, "others"
        for row in (tried[purpose, "found in", "seed_1"], tried[purpose, "found by", "swap at prompt_last"]):
            assert (row["edit"], row["positions"], row["dose"]) == chosen
            assert (row["random"], row["median"]) == (0, 0)
        empty, wide = (tried[purpose, "found by", f"slot at {positions}"] for positions in ("all", "prompt_last"))
        assert (empty["size"], empty["effect"], empty["random"], empty["median"]) == (0, None, None, None)
        assert (wide["size"], wide["effect"], wide["random"], wide["median"]) == (13, sign, None, None), "no 13 others act"
        at_last = tried[purpose, "edited by", f"{chosen.edit} at prompt_last"]
        assert at_last["effect"] == sign
        assert tried[purpose, "edited by", f"{chosen.edit} at generated"]["effect"] == 0
        largest = max(setting.dose for setting in done.result.searched[purpose].effects)
        assert all(row["dose"] <= largest for row in done.tried if row["purpose"] == purpose)
    assert sum(case.varied == "edited by" for case in cases(done.result, OTHERWISE)) == 2 * 2 * 3
    assert DRAWS == 5


def test_a_killed_study_goes_on_and_ends_as_one_that_was_not(done: Done) -> None:
    left = {name: value for i, (name, value) in enumerate(done.parts.kept.items()) if i % 9}
    again = whole(done.models.folders[ZEROED].parent, Parts(left))
    assert again.parts.computed == [name for name in done.parts.kept if name not in left]
    tables = [json.dumps([vars(each.result) | {"searched": ""}, each.tried]) for each in (done, again)]
    assert tables[0] == tables[1]


def editable(purpose: Any = ZEROED, seed: int = 0) -> EditableModel:
    """A model with random weights, whose answers depend on all that is done to it."""
    model, tokenizer = tiny_model(seed)
    crosscoder = random_crosscoder(HELD, d_model=16, n_features=24, threshold=1.0).requires_grad_(False)
    editor = Editor(crosscoder, purpose.alike, 1, CPU, torch.full((24,), 6.0), purpose.toward, tiny_model(seed + 1)[0])
    return EditableModel(purpose, Evaluator(model, tokenizer, TASKS, batch_size=64, max_new_tokens=4), editor)


def test_rows_under_many_edits_are_those_under_each_alone() -> None:
    made, asked = editable(), QUESTIONS.report
    changes = [None] + [
        made.editor.edit(kind, [3, 5], positions, 2.0)
        for kind in ("zero", "transplant", "add")
        for positions in ("all", "prompt_last", "generated", "prompt")
    ]
    for shared in (None, PromptCache()):
        found = made.evaluator.answer_under(changes, asked, shared=shared)
        assert found == [made.evaluator.answer(asked, edit=change) for change in changes]
        assert shared is None or len(shared._kept) > 1, "prompts of model and donor are kept for further passes"
    assert [row["sample_id"] for row in found[0]] == [sample.sample_id for sample in asked]
    assert len({json.dumps(rows) for rows in found}) > 6


CONTROLS = [
    Control("set", 0, (3, 5)),
    Control("shared", 0, (4, 6)),
    *(Control("random", i, (i, i + 8)) for i in range(7)),
    Control("random_direction", 0, direction_D=torch.eye(16)[0]),
    Control("mean_difference", 0, direction_D=torch.eye(16)[1]),
    Control("alone", 0, (3,)),
]


def outcome(setting: Setting, other: Setting) -> Searched:
    """Every control under ``other``, the set and its parts under ``setting``."""
    chosen = {each.label: setting if each.name in ("set", "alone") else other for each in CONTROLS}
    return Searched(CONTROLS, chosen, {}, [])


def test_edits_of_the_study_take_what_was_chosen_for_each() -> None:
    made = edits(editable(), [3, 5], outcome(Setting("zero", "all", 0.5), Setting("zero", "prompt_last", 0.25)), CONTROLS)
    assert list(made)[:3] == [("none", 0), ("noop", 0), ("reconstruction", 0)]
    assert list(made)[3:] == [(each.name, each.number) for each in CONTROLS]
    assert made.pop(("none", 0)) is None
    found = {key: (type(edit), edit.positions, edit.dose) for key, edit in made.items() if edit is not None}
    assert found["noop", 0] == (FeatureEdit, "all", 0.0)
    assert found["reconstruction", 0] == (FeatureEdit, "all", 1.0)
    assert found["set", 0] == found["alone", 0] == (FeatureEdit, "all", 0.5)
    assert found["shared", 0] == found["random", 6] == (AsLong, "prompt_last", 0.25)
    assert found["mean_difference", 0] == found["random_direction", 0] == (Push, "prompt_last", 0.25)


def test_fewer_keeps_the_first_draws_and_no_part_of_the_set() -> None:
    made = {("none", 0): None} | {(each.name, each.number): None for each in CONTROLS}
    assert list(fewer(made, 2)) == [
        ("none", 0), ("set", 0), ("shared", 0), ("random", 0), ("random", 1), ("random_direction", 0), ("mean_difference", 0)
    ]  # fmt: skip
    parts = list(chunks(made))
    assert [len(part) for _, part in parts] == [study.TOGETHER, len(made) - study.TOGETHER]
    assert {key: None for _, part in parts for key in part} == made
    assert len({name for name, _ in parts}) == 2


def test_answers_are_marked_and_those_of_directions_kept_whole() -> None:
    model, names = editable(), list[str]()
    asked = QUESTIONS.report
    toward = {row["sample_id"]: row for row in model.evaluator.answer(asked)}
    made = edits(model, [3, 5], outcome(Setting("add", "prompt_last", 2.0), Setting("add", "generated", 1.0)), CONTROLS)
    p = params(draw_questions=2)
    found = answer(model, made, asked, toward, p, lambda jobs: once(jobs, names.append))
    assert len(set(names)) == len(names)
    assert found.marks.keys() == made.keys()
    few = first_of_each(asked, 2)
    assert 0 < len(few) < len(asked)
    for (control, _), each in found.marks.items():
        n = len(few if control in ("random", "random_direction") else asked)
        assert {len(values) for values in each.values()} == {n}, control
    drawn = answer(model, {("random", 0): made["random", 0]}, few, toward, p, once)
    assert found.marks["random", 0] == drawn.marks["random", 0]
    assert found.marks["none", 0]["alike"] == [True] * len(asked)
    assert found.marks["noop", 0] == found.marks["none", 0]
    assert not all(found.marks["set", 0]["alike"])
    assert {(row["control"], row["model"]) for row in found.rows} == {
        (control, "after") for control in ("none", "noop", "set", "mean_difference")
    }
    for key in ("none", "set"):
        rows = [row for row in found.rows if row["control"] == key]
        assert [row["correct"] for row in rows] == found.marks[key, 0]["correct"]
    plain, noop = ([row for row in found.rows if row["control"] == key] for key in ("none", "noop"))
    assert [row | {"control": "none"} for row in noop] == plain
    assert set(found.nats) == set(fewer(made, FEW))
    assert set(found.nats["set", 0]) == {sample.sample_id for sample in asked if sample.task != "quiz"}
    assert found.nats["noop", 0] == found.nats["none", 0] != found.nats["set", 0]


def test_collateral_is_at_every_token_and_nothing_for_the_no_op() -> None:
    model = editable(AMPLIFIED)
    made = edits(model, [3, 5], outcome(Setting("add", "prompt_last", 2.0), Setting("add", "generated", 1.0)), CONTROLS)
    made = study._everywhere(made)
    rows = collateral(model.purpose, made, once(reading(model, made, QUESTIONS.texts, params())), params(), 0)
    by_control = {row["control"]: row for row in rows if row["set_draw"] == 0}
    assert len(rows) == len(fewer(made, FEW))
    assert (by_control["noop"]["change"], by_control["noop"]["low"], by_control["noop"]["high"]) == (0, 0, 0)
    assert by_control["noop"]["perplexity"] == by_control["none"]["perplexity"]
    assert (by_control["set"]["n"], by_control["set"]["purpose"], by_control["set"]["model"]) == (3, AMPLIFY_ORIGINAL, "before")
    assert by_control["set"]["low"] <= by_control["set"]["change"] <= by_control["set"]["high"]
    expected = by_control["none"]["perplexity"] * np.exp(by_control["set"]["change"])
    assert by_control["set"]["perplexity"] == pytest.approx(expected)
    changes = [row["change"] for row in rows if row["control"] not in ("none", "noop")]
    assert len(set(changes)) == len(changes)
    assert 0 not in changes


def test_a_repeat_is_edited_through_the_slot_of_the_tuned_model(done: Done) -> None:
    models = done.models
    repeat = models.open(REPEATED)
    slots = {purpose.name: models.open(purpose).editor.model for purpose in models.folders}
    assert slots == {
        "zero_tuned": "after", "zero_contrast": "other", "amplify_original": "before", "repeat_after_1": "after"
    }  # fmt: skip
    donors = {purpose.name: models.open(purpose).editor.donor_name for purpose in models.folders}
    assert donors == dict.fromkeys(slots, "before") | {"amplify_original": "after"}
    assert models.original.editor.donor is models.tuned.evaluator.model
    assert repeat.editor.donor is models.original.evaluator.model
    own, tuned = (made.evaluator.model.model.embed_tokens.weight for made in (repeat, models.tuned))
    assert not torch.equal(own, tuned), "it is the repeat that answers"
    resid_BTD: Tensor = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)) * 3
    found = repeat.editor.edit("zero", [3, 5], "all", 1.0)(resid_BTD, None, prompt=True)
    assert torch.equal(found, models.tuned.editor.edit("zero", [3, 5], "all", 1.0)(resid_BTD, None, prompt=True))
    assert not torch.equal(found, resid_BTD)


def test_streams_are_those_at_the_last_token_of_each_prompt_of_model_and_donor() -> None:
    model = editable()
    own, donors = model.streams(QUESTIONS.tune)
    assert own.shape == donors.shape == (len(QUESTIONS.tune), 1, 16)
    for each, read in ((model.evaluator.model, own), (model.editor.donor, donors)):
        for sample, stream in zip(QUESTIONS.tune, read, strict=True):
            ids = torch.tensor([model.evaluator.tokenizer(sample.prompt)["input_ids"]])
            with torch.inference_mode():
                states = each(input_ids=ids, output_hidden_states=True).hidden_states[1]
            torch.testing.assert_close(stream, states[0, -1:], rtol=1e-4, atol=1e-4)
