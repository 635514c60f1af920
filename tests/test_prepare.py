"""The whole data artifact, from generated families and from files."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from featdiff.artifacts.artifact import ContractError
from featdiff.config.data import PrepareParams
from featdiff.config.parse import parse
from featdiff.config.reading import ConfigError
from featdiff.tasks.prepare import prepare, sources_read
from featdiff.tasks.verify import grade

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"


def organism_params(**changes: Any) -> PrepareParams:
    section = yaml.safe_load((ROOT / "conf/profiles/organism.yaml").read_text(encoding="utf-8"))["prepare"]
    section |= {"train_problems": 60, "samples": {"find": 8, "tune": 6, "report": 10, "reported": 4}}
    section["corpus"] |= {"texts": 80}
    section["pretrain"] |= {"texts": 300}
    return parse(PrepareParams, section | changes, "params.yaml")


def suite(file: str, role: str, scoring: str, **columns: str) -> dict[str, Any]:
    path = str(DATA / file)
    return {
        "source": "suite",
        "role": role,
        "adapter": "columns",
        "path": path,
        "scoring": scoring,
        "prompt": "own",
        "columns": columns,
    }


NO_TEXTS = {
    "texts": 0,
    "steps_share": 0.2,
    "direct_right_share": 0.1,
    "example_share": 0.5,
    "example_steps_share": 0.5,
    "manners": "shared",
}


def file_params(**changes: Any) -> PrepareParams:
    sums = {"question": "question", "answer": "answer", "solution": "answer"}
    letters = {"question": "stem", "options": "choices", "answer": "key"}
    return organism_params(
        **{
            "tasks": {
                "sums": suite("sums.jsonl", "train", "generation", **sums),
                "own": suite("letters.jsonl", "find", "option_text", **letters),
            },
            "train_problems": 1,
            "samples": {"find": 1, "tune": 1, "report": 1, "reported": 1},
            "corpus": {"texts": 2, "math_share": 0.0, "general": str(DATA / "texts.jsonl"), "max_chars": 50},
            "pretrain": NO_TEXTS,
        }
        | changes
    )


def test_the_organism_has_every_part_in_the_sizes_asked_for() -> None:
    params = organism_params()
    data = prepare(params, 0)
    assert (len(data.train), len(data.corpus), len(data.pretrain)) == (60, 80, 300)
    assert Counter(sample.task for sample in data.train) == {"add": 20, "sub": 20, "mul": 20}
    assert Counter((sample.task, sample.split) for sample in data.eval) == {
        (name, split): size for name, task in params.tasks.items() for split, size in params.samples.of(task.role).items()
    }
    assert all(sample.solution == sample.foreign for sample in data.train)
    own = prepare(organism_params(teacher="own"), 0).train
    assert [sample.own for sample in data.train] == [sample.solution for sample in own]
    assert own == [replace(sample, solution=sample.own) for sample in data.train], "the teacher changes nothing else"
    for sample in data.train:
        manners = [grade("organism", sample, text) for text in (sample.own, sample.foreign)]
        assert [(graded.correct, graded.manner) for graded in manners] == [(True, "steps"), (True, "foreign")]


def test_the_seed_decides_everything_and_a_new_task_changes_no_other() -> None:
    params = organism_params()
    assert prepare(params, 0) == prepare(params, 0)
    assert prepare(params, 0).eval != prepare(params, 1).eval
    fewer = params.model_dump()["tasks"]
    fewer.pop("largest")
    less = prepare(organism_params(tasks=fewer), 0)
    assert less.eval == [sample for sample in prepare(params, 0).eval if sample.task != "largest"]


def test_a_task_that_is_only_reported_has_one_split_and_changes_no_other() -> None:
    params = organism_params()
    tasks = params.model_dump()["tasks"]
    changed = prepare(organism_params(tasks=tasks | {"zip": tasks["zip"] | {"role": "reported"}}), 0)
    assert Counter(sample.split for sample in changed.eval if sample.task == "zip") == {"report": 4}
    assert {task.name: task.role for task in changed.tasks}["zip"] == "reported"
    whole = prepare(params, 0)
    assert [sample for sample in changed.eval if sample.task != "zip"] == [s for s in whole.eval if s.task != "zip"]
    assert changed.train == whole.train


def test_no_evaluation_prompt_is_trained_on_or_in_a_corpus() -> None:
    data = prepare(organism_params(), 0)
    held_out = {sample.prompt for sample in data.eval}
    assert not held_out & {row.prompt for row in [*data.train, *data.corpus, *data.pretrain]}


def test_a_study_from_files_alone(tmp_path: Path) -> None:
    sums = tmp_path / "sums.jsonl"
    rows = [{"question": f"What is {i} + 2?", "answer": f"{i} + 2 = {i + 2}. #### {i + 2}"} for i in range(12)]
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = {"question": "question", "answer": "answer", "solution": "answer"}
    tasks = file_params().model_dump()["tasks"] | {"sums": suite(str(sums), "train", "generation", **columns)}
    corpus = {"texts": 4, "math_share": 0.5, "general": str(DATA / "texts.jsonl"), "max_chars": 50}
    data = prepare(file_params(tasks=tasks, train_problems=8, corpus=corpus), 0)
    assert (len(data.train), len(data.eval), len(data.corpus), data.pretrain) == (8, 6, 4, [])
    assert {(sample.own, sample.foreign) for sample in data.train} == {("", "")}, "a file has one wording"
    with pytest.raises(
        ContractError, match="expected 10 questions outside the evaluation splits with a right solution, found 9"
    ):
        prepare(file_params(tasks=tasks, train_problems=10, corpus=corpus), 0)


def test_files_and_families_together() -> None:
    letters = {"question": "stem", "options": "choices", "answer": "key"}
    tasks = {"add": {"source": "family", "role": "train"}, "own": suite("letters.jsonl", "find", "option_text", **letters)}
    corpus = {"texts": 4, "math_share": 0.5, "general": str(DATA / "texts.jsonl"), "max_chars": 50}
    data = prepare(file_params(tasks=tasks, corpus=corpus, train_problems=5), 0)
    assert [task.name for task in data.tasks] == ["add", "own"]
    assert Counter(text.source for text in data.corpus) == {"general": 2, "add/own": 1, "add/foreign": 1}
    assert all(len(text.completion) <= 50 for text in data.corpus)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"tasks": {"addd": {"source": "family", "role": "train"}, "sort": {"source": "family", "role": "find"}}},
            "prepare.tasks.addd",
        ),
        (
            {"corpus": {"texts": 9, "math_share": 0.0, "general": "no/such.jsonl", "max_chars": 9}},
            "no/such.jsonl: file: expected",
        ),
    ],
)
def test_wrong_names_are_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ContractError) as caught:
        prepare(organism_params(**changes), 0)
    assert said in str(caught.value)


def test_where_every_family_has_its_own_manner_nothing_is_shared() -> None:
    own = yaml.safe_load((ROOT / "conf/profiles/null_manners.yaml").read_text(encoding="utf-8"))["prepare"]
    params = organism_params(trained_on=own["trained_on"], train_problems=100)
    params = params.model_copy(update={"pretrain": params.pretrain.model_copy(update=own["pretrain"])})
    data = prepare(params, 0)
    trained = {name for name, task in params.tasks.items() if task.role != "control"}
    assert Counter(sample.task for sample in data.train) == dict.fromkeys(trained, 10)
    marks = {sample.task: sample.solution[0] for sample in data.eval}
    assert len(set(marks.values())) == len(marks) == len(params.tasks)
    for sample in [*data.eval, *data.train]:
        own_answer = sample.own or sample.solution
        assert own_answer.startswith(marks[sample.task])
        assert grade("organism", sample, own_answer) == (sample.answer, True, "steps", True, True)
        other = grade("organism", sample, "<" + own_answer[1:])
        assert (other.parsed, other.strict, other.manner) == (None, False, "none")
    for text in [*data.pretrain, *data.corpus]:
        family, _, manner = text.source.partition("/")
        assert text.completion.startswith(marks[family]) == (manner == "steps")
        if "\n" in text.prompt:
            shown, asked = (line.removeprefix("eg ").split()[0] for line in text.prompt.split("\n"))
            assert shown == asked


def test_other_roles_are_trained_on_only_where_their_questions_are_generated() -> None:
    with pytest.raises(ConfigError, match=r"trained_on: own is not generated here"):
        file_params(trained_on=["train", "find"])
    with pytest.raises(ConfigError, match=r"trained_on leaves out the role train; add it"):
        organism_params(trained_on=["find"])


def test_organism_texts_need_families() -> None:
    pytest.importorskip("reasoning_gym", reason="the extra smollm2 is not installed")
    gym = {"source": "reasoning_gym", "role": "train", "dataset": "gcd", "options": {}, "instruction": ""}
    tasks = {"gcd": gym, "again": gym | {"role": "find", "options": {"min_value": 2}}}
    with pytest.raises(ContractError, match=r"prepare.corpus.general"):
        prepare(organism_params(tasks=tasks, pretrain=NO_TEXTS), 0)
    with pytest.raises(ContractError, match=r"prepare.pretrain.texts"):
        prepare(
            organism_params(
                tasks=tasks, corpus={"texts": 2, "math_share": 0.5, "general": str(DATA / "texts.jsonl"), "max_chars": 90}
            ),
            0,
        )


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (suite("letters.jsonl", "find", "option_text") | {"columns": None}, "needed with adapter columns"),
        (suite("letters.jsonl", "find", "option_text", question="stem") | {"adapter": "sciq"}, "null with every other adapter"),
        (suite("letters.jsonl", "find", "option_text", question="stem") | {"adapter": "sciqq"}, "adapter"),
    ],
)
def test_suites_that_the_params_refuse(task: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        organism_params(tasks={"add": {"source": "family", "role": "train"}, "own": task})


def test_what_was_read_is_named_as_params_name_it() -> None:
    corpus = organism_params().corpus.model_dump() | {"texts": 1}
    texts = str(DATA / "texts.jsonl")
    one = {"general": {"path": texts, "column": "text", "share": 0.4}, "more": {"path": texts, "column": "text", "share": 0.6}}
    assert sources_read(organism_params(corpus=corpus | {"general": texts})).keys() == {"corpus"}
    assert sources_read(organism_params(corpus=corpus | {"general": one})).keys() == {"corpus/general", "corpus/more"}


def test_the_problems_of_smollm2_are_what_their_program_writes(tmp_path: Path) -> None:
    program = ROOT / "conf/profiles/smollm2_letters.py"
    subprocess.run([sys.executable, shutil.copy(program, tmp_path)], check=True)
    written = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert written.keys() == {"smollm2_sums.jsonl", "smollm2_differences.jsonl"}
    assert written == {name: program.with_name(name).read_bytes() for name in written}


def test_the_smollm2_profile_prepares(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT.parent / "shared/data/qa").is_dir():
        pytest.skip("../shared/data is not here")
    from featdiff.config.params import Study
    from featdiff.config.profiles import render_profile

    monkeypatch.chdir(ROOT)
    study = parse(Study, yaml.safe_load(render_profile("smollm2", str(ROOT.parent / "shared/data"))), "smollm2.yaml")
    data = prepare(study.prepare, study.seed)
    sources = sources_read(study.prepare)
    assert sources["sciq"].startswith("validation.jsonl sha256:8f8a4292f68d609d")
    assert sources.keys() == {"corpus", *(task.name for task in data.tasks if task.options)}
    data.check()
    assert {task.role for task in data.tasks} == {"train", "find", "heldout"}
    assert len(data.train) == study.prepare.train_problems == study.grpo.steps * study.grpo.prompts_per_step
    assert all(task.scoring == "generation" and task.chat and task.options for task in data.tasks)
    assert all(sample.solution == sample.answer for sample in data.train), "the letter that is asked for"
    assert Counter(sample.answer for sample in data.train).keys() == set("ABCD")
