"""Bad input through the real stage scripts: one line that says what to do, a non-zero exit, nothing half-published.

The scripts run in forks of one process that has imported torch already; nothing else differs from running them.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from featdiff import artifact
from featdiff.tasks.task import Data, Sample, TaskInfo, Text, read_rows, write_rows
from project import ALPHABET, ROOT, Project

FORKS = """
import json, os, runpy, sys, traceback
import featdiff.activations.harvest, featdiff.intervention.study, featdiff.models, featdiff.tasks.prepare
import featdiff.training.imported, featdiff.training.pretrain

def stage(job):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(job["cwd"])
    sys.argv = job["argv"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    if (child := os.fork()) == 0:
        code = stage(json.loads(line))
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SMALL = {"prepare.train_problems": 6, "prepare.samples": {"find": 2, "tune": 1, "report": 2}, "prepare.pretrain.texts": 50}


@pytest.fixture(scope="module")
def forks() -> Iterator[Callable[[Path, list[str]], tuple[int, str, str]]]:
    environment = Project(ROOT).environment
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        out, err = Path(folder) / "out", Path(folder) / "err"

        def run(cwd: Path, argv: list[str]) -> tuple[int, str, str]:
            job = {"cwd": str(cwd), "argv": argv, "out": str(out), "err": str(err)}
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
            return code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")

        yield run
        process.stdin.close()


@pytest.fixture
def run(forks: Callable[[Path, list[str]], tuple[int, str, str]], project: Project) -> Run:
    def run(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, *forks(cwd or project.path, list(argv)))

    return run


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def suite(path: str, scoring: str = "option_text") -> dict[str, Any]:
    columns = {"question": "question", "answer": "answer"} | ({} if scoring == "generation" else {"options": "options"})
    return {"source": "suite", "role": "find", "adapter": "columns", "path": path, "scoring": scoring, "columns": columns}


def question(number: int, **changes: Any) -> dict[str, Any]:
    return {"question": f"Which of {number}?", "options": ["this", "that"], "answer": 0} | changes


@pytest.mark.graph
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sft.epoch": 3}, ["params.yaml: sft.epoch: unknown key; did you mean epochs?"]),
        ({"prepare.train_problems": "many"}, ["params.yaml: prepare.train_problems", "valid integer", "'many'"]),
        ({"prepare.tasks.adds": {"source": "family", "role": "find"}}, ["prepare.tasks.adds", "a family (add, "]),
        ({"prepare.corpus.general": "no/such.jsonl"}, ["no/such.jsonl: file", "correct the path in params.yaml"]),
        ({"prepare.tasks.own": suite("no/such.jsonl")}, ["no/such.jsonl: file", "correct the path in params.yaml"]),
    ],
    ids=["typo", "type", "family", "no corpus", "no file"],
)
def test_params_that_prepare_cannot_use(project: Project, run: Run, changes: dict[str, Any], words: list[str]) -> None:
    project.set(SMALL | changes)
    result = run("stages/prepare.py")
    assert result.returncode == 2
    project.refused(result, "data", "featdiff: prepare: ", *words)


@pytest.mark.graph
@pytest.mark.parametrize(
    ("rows", "scoring", "words"),
    [
        ([], "option_text", ["rows: expected at least one, found none"]),
        ([question(1), "not an object"], "option_text", [":2: line: expected a JSON object, found str"]),
        ([question(1), {"question": "Why?"}], "option_text", [":2: options: expected a column 'options'"]),
        ([question(1, answer="neither")], "option_text", [":1: answer: expected", "'neither'"]),
        ([question(1, answer=2)], "option_text", [":1: answer: expected an index from 0 to 1, found 2"]),
        ([question(1, options=["this", " "])], "option_text", [":1: options: expected a text, found a blank one"]),
        ([question(1, answer="no number")], "generation", [":1: answer: expected a text with a number, found 'no number'"]),
        ([question(i) for i in range(4)], "option_text", ["expected", "found 4"]),
        ([question(1)] * 9, "option_text", ["found 1"]),
    ],
    ids=["empty", "no object", "no column", "no option", "no index", "blank", "unparsable", "too few", "duplicates"],
)
def test_questions_that_cannot_be_used(
    project: Project, run: Run, tmp_path: Path, rows: list[Any], scoring: str, words: list[str]
) -> None:
    project.set(SMALL | {"prepare.tasks.own": suite(jsonl(tmp_path / "own.jsonl", rows), scoring)})
    project.refused(run("stages/prepare.py"), "data", "own", *words)


@pytest.mark.graph
@pytest.mark.parametrize(
    "line", [b"{", b"\xff\xfe", b'{"question": NaN,}', b"[" * 100_000], ids=["cut", "no text", "comma", "deep"]
)
def test_a_line_that_is_no_json(project: Project, run: Run, tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(json.dumps(question(1)).encode() + b"\n\n" + line)
    project.set(SMALL | {"prepare.tasks.own": suite(str(path))})
    result = run("stages/prepare.py")
    project.refused(result, "data", "own.jsonl:3: line: expected JSON", "one JSON object per line, in UTF-8")


@pytest.mark.graph
def test_prepare_on_a_full_disk(small_disk: Path, run: Run) -> None:
    project = Project(small_disk / "project")
    project.path.mkdir()
    project.fill().set({"prepare.pretrain.texts": 25_000})
    result = run("stages/prepare.py", cwd=project.path)
    assert result.returncode == 2
    project.refused(result, "data", "no space left on device")


def test_an_unknown_profile(project: Project) -> None:
    before = (project.path / "params.yaml").read_bytes()
    result = project.run("-m", "featdiff.profiles", "use", "smolm2")
    assert (result.returncode, (project.path / "params.yaml").read_bytes()) == (2, before)
    project.refused(result, "data", "profile 'smolm2': unknown; did you mean smollm2?")


TASKS = {
    name: TaskInfo(name, role, "words", "generation", "organism", "strict", False, 0)
    for name, role in {"t": "find", "m": "train"}.items()
}


def sample(number: int, split: str = "find", task: str = "t") -> Sample:
    return Sample(f"{task}-{split}-{number}", task, split, f"{'abcdef'[number]}{'bc' * number}=", "abc", solution="abc.")


@pytest.fixture
def study(project: Project, make_model: Callable[..., Any], tokenizer: Any) -> Project:
    """A project with small artifacts of prepare, base, sft and grpo."""
    from featdiff.models import save_model

    evaluation = [sample(i, split) for split in ("find", "tune", "report") for i in range(2)]
    texts = [Text("abc", "def =.", "t")] * 8
    with project.publishing("data") as folder:
        Data(list(TASKS.values()), [sample(i, "train", "m") for i in range(3)], evaluation, texts).save(folder)
    for seed, name in enumerate(("base", "sft", "grpo")):
        with project.publishing(f"models/{name}") as folder:
            save_model(make_model(seed), tokenizer, folder)
    project.set({"activations.tokens": 40, "activations.checkpoint_tokens": 20, "evaluate.bootstrap": 10})
    return project


@pytest.mark.graph
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), ["base.source: expected a model folder, found nothing"]),
        (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["weights: expected *.safetensors, found no weights"]),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            ["found a pickle (pytorch_model.bin)"],
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 99), ["model: expected a causal language model"]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer"]),
    ],
    ids=["no folder", "no config", "no weights", "pickle", "broken", "no tokenizer"],
)
def test_a_base_that_cannot_be_used(study: Project, run: Run, damage: Callable[[Path], object], words: list[str]) -> None:
    folder = Path(shutil.copytree(study.path / "models/base", study.path / "given"))
    shutil.rmtree(study.path / "models/base")
    damage(folder)
    study.set({"base.source": "given"})
    result = run("stages/base.py")
    assert result.returncode == 2
    study.refused(result, "models/base", "featdiff: base: ", "given", *words)


@pytest.mark.graph
def test_an_arm_with_another_tokenizer_than_the_base(study: Project, run: Run, make_model: Callable[..., Any]) -> None:
    from featdiff.models import character_tokenizer, save_model

    with study.publishing("models/sft") as folder:
        save_model(make_model(), character_tokenizer([ALPHABET.replace("f", "g")]), folder)
    for stage, out in (("evaluate", "evals/sft"), ("activations", "activations/sft")):
        result = run(f"stages/{stage}.py", "--model", "sft")
        assert result.returncode == 2
        study.refused(
            result, out, f"{stage}@sft: models/sft: tokenizer: expected that of models/base", "train it from models/base"
        )


@pytest.mark.graph
def test_an_input_that_is_damaged_or_not_there(study: Project, run: Run) -> None:
    weights = study.path / "models/grpo/model.safetensors"
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1
    weights.write_bytes(body)
    study.refused(
        run("stages/evaluate.py", "--model", "grpo"), "evals/grpo", "models/grpo/model.safetensors: sha256", "dvc checkout"
    )
    shutil.rmtree(study.path / "data")
    study.refused(run("stages/evaluate.py", "--model", "base"), "evals/base", "data: folder", "run the stage that makes it")


@pytest.mark.graph
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activations.layer": 3}, ["params.yaml: activations.layer: expected 1 to 2 for this model, or middle, found 3"]),
        ({"activations.tokens": 10_000}, ["params.yaml: activations.tokens: expected at most 72 (the corpus), found 10000"]),
        ({"activations.layer": "last"}, ["params.yaml: activations.layer:", "'middle'", "'last'"]),
    ],
    ids=["layer", "tokens", "word"],
)
def test_activations_that_cannot_be_taken(study: Project, run: Run, changes: dict[str, Any], words: list[str]) -> None:
    study.set(changes)
    result = run("stages/activations.py", "--model", "base")
    assert result.returncode == 2
    study.refused(result, "activations/base", *words)


@pytest.mark.graph
def test_too_few_flipped_samples_are_a_result(study: Project, run: Run) -> None:
    import torch
    from safetensors.torch import save_file

    from featdiff.crosscoder.model import Crosscoder

    for name, right in (("base", False), ("grpo", True)):
        rows = [
            {
                "sample_id": f"t-find-{i}", "task": "t", "split": "find", "mode": "greedy", "draw": 0, "completion": "abc.",
                "parsed": "abc", "correct": right, "manner": "direct",
            }
            for i in range(2)
        ]  # fmt: skip
        with study.publishing(f"evals/{name}") as folder:
            write_rows(folder / "samples.parquet", rows)
    crosscoder = Crosscoder(["base", "sft", "grpo"], 16, 32, "batchtopk")
    crosscoder.initialise(0.1, torch.Generator().manual_seed(0))
    with study.publishing("crosscoders/joint_topk") as folder:
        crosscoder.save(folder, layer=1, seed=0)
        names = ("firing_rate", "mean_activation", "max_activation")
        save_file({name: torch.ones(32) for name in names}, folder / "features.safetensors")
    assert run("stages/activations.py", "--model", "grpo").returncode == 0

    study.set({"localize.min_flipped": 3, "localize.bootstrap": 20, "localize.seeds": []})
    result = run("stages/localize.py")
    assert result.returncode == 0, result.stderr
    folder = study.path / "analysis/localize"
    artifact.verify(folder)
    found = artifact.read_json(folder / "features.json")
    assert (found["status"], found["features"]) == ("too_few_flipped", [])
    assert found["skipped"] == {"t": "2 flipped samples, 3 needed"}
    assert read_rows(folder / "scores.parquet") == []
    result = run("stages/describe.py")
    assert result.returncode == 0, result.stderr
    artifact.verify(study.path / "analysis/describe")
    described = artifact.read_json(study.path / "analysis/describe/features.json")
    assert (described["status"], described["features"]) == ("too_few_flipped", [])
    assert read_rows(study.path / "analysis/describe/contexts.parquet") == []
    assert artifact.read_json(study.path / "analysis/describe/metrics.json")["status"] == "too_few_flipped"
    result = run("stages/intervene.py")
    assert result.returncode == 0, result.stderr
    assert artifact.read_json(study.path / "analysis/intervene/metrics.json") == {"status": "too_few_flipped"}

    study.set({"localize.min_flipped": 2})
    result = run("stages/localize.py")
    assert result.returncode == 0, result.stderr
    found = artifact.read_json(folder / "features.json")
    assert found["status"] in ("found", "empty_intersection")
    assert found["per_task"]["t"]["n_flipped"] == 2


@pytest.mark.graph
def test_the_same_artifacts_unharmed_are_evaluated(study: Project, run: Run) -> None:
    result = run("stages/evaluate.py", "--model", "sft")
    assert result.returncode == 0, result.stderr
    artifact.verify(study.path / "evals/sft")
    rows = read_rows(study.path / "evals/sft/samples.parquet")
    assert len(rows) == 6 * (1 + 2)
    assert [path.name for path in (study.path / "evals").iterdir()] == ["sft"]
