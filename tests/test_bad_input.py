"""Bad input through the real stage scripts: one line that says what to do, a non-zero exit, nothing half-published.

The scripts run in forks of one process that has imported torch already, with a limit on memory and time: what fills memory or
hangs is killed, and is no refusal.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from featdiff.artifacts import artifact
from featdiff.artifacts.tables import CONTEXTS, EVAL_SAMPLES, SCORES
from featdiff.tasks.task import Data, Sample, TaskInfo, Text
from project import ALPHABET, ROOT, Project

FORKS = """
import json, os, resource, runpy, signal, sys, traceback
import featdiff.activations.harvest, featdiff.intervention.study, featdiff.language.models, featdiff.tasks.prepare
import featdiff.training.imported, featdiff.training.pretrain

def stage(job):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (2**34 if hard < 0 else min(2**34, hard), hard))
    signal.alarm(100)
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
SMALL = {
    "prepare.train_problems": 6,
    "prepare.samples": {"find": 2, "tune": 1, "report": 2, "reported": 2},
    "prepare.pretrain.texts": 50,
}


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
    return {
        "source": "suite",
        "role": "find",
        "adapter": "columns",
        "path": path,
        "scoring": scoring,
        "prompt": "own",
        "columns": columns,
    }


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
        ({"arms.new": {"method": "sft"}}, ["arms.new: this name is taken; choose another"]),
        ({"dynamics.fit": "null_sft"}, ["dynamics.fit = null_sft does not hold base"]),
    ],
    ids=["typo", "type", "family", "no corpus", "no file", "class of features", "dictionary"],
)
def test_params_that_prepare_cannot_use(project: Project, run: Run, changes: dict[str, Any], words: list[str]) -> None:
    project.set(SMALL | changes)
    result = run("stages/prepare.py")
    assert result.returncode == 2
    project.refused(result, "data", "featdiff: prepare: ", *words)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(30)
)


@pytest.mark.graph
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [*a]\n", ["params.yaml:1: anchors"]),
        (BOMB, ["params.yaml:1: anchors"]),
        ("seed: !!python/object/apply:os.getcwd []\n", ["params.yaml:1: ", "tags (!) are not read"]),
        ("a: " + "[" * 5000 + "]" * 5000, ["params.yaml:1: nested more than 32 deep"]),
        ("a:\n  " + "- " * 200, ["params.yaml:2: nested more than 32 deep"]),
        ("seed: 0\nseed: 1\n", ["key 'seed' is given twice", "line 2"]),
        ("sft: {lr: 1.0, lr: 2.0}\n", ["key 'lr' is given twice", "line 1"]),
        ("about: 'a\x07b'\n", ["params.yaml: not valid YAML", "control characters"]),
        ('about: "a\\0b"\n', ["params.yaml: not valid YAML", "a control character"]),
        ('about: "\\ud800"\n', ["params.yaml: not valid YAML"]),
        ("seed: " + "9" * 5000, ["params.yaml: not valid YAML", "more than 40 characters"]),
        ("day: 2020-99-99\n", ["params.yaml: not valid YAML", "month"]),
        ("? [a, b]\n: 1\n", ["expected a text as key"]),
        ("# " + "x" * 2**20, ["params.yaml: expected at most 1048576 bytes"]),
        (None, ["params.yaml: expected a file, found a folder"]),
    ],
    ids=[
        "refers to itself", "bomb", "tag", "deep flow", "deep block", "twice", "twice inside", "bell", "null", "surrogate",
        "digits", "date", "list as key", "large", "folder",
    ],
)  # fmt: skip
def test_params_that_are_no_plain_yaml(project: Project, run: Run, text: str | None, words: list[str]) -> None:
    path = project.path / "params.yaml"
    path.unlink()
    if text is None:
        path.mkdir()
    else:
        path.write_text(text, encoding="utf-8")
    result = run("stages/prepare.py")
    assert result.returncode == 2
    project.refused(result, "data", "featdiff: prepare: ", *words)


@pytest.mark.graph
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prepare.train_problems": 10**12}, ["prepare.train_problems", "less than or equal to", "1000000000000"]),
        ({"prepare.train_problems": 10**7}, ["prepare.tasks.add: expected 3333333 further questions, found 3645 in all"]),
        (
            {"prepare.samples": {"find": 900, "tune": 1, "report": 2, "reported": 2}},
            ["prepare.tasks.mul: expected 903 further questions, found 800 in all"],
        ),
        (
            {"base.pretraining.layers": 10**5, "base.pretraining.d_mlp": 10**5},
            ["base.pretraining: layers, d_model and d_mlp make"],
        ),
        ({"grpo.rollouts": 10**9}, ["grpo.rollouts", "less than or equal to 10000"]),
        ({"prepare.tasks.abc\n": {"source": "family", "role": "find"}}, ["'abc\\n'", "a name is 1 to 40 lowercase letters"]),
        ({"base.source": ""}, ["base.source", "at least 1 character"]),
    ],
    ids=["problems", "family", "samples", "organism", "rollouts", "name", "source"],
)
def test_sizes_and_names_that_can_only_be_typos(project: Project, run: Run, changes: dict[str, Any], words: list[str]) -> None:
    project.set(SMALL | changes)
    result = run("stages/prepare.py")
    assert result.returncode == 2
    project.refused(result, "data", "featdiff: prepare: params.yaml: ", *words)


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
        ([question(1, answer="no number")], "generation", [":1: answer: expected a text with one number, found 'no number'"]),
        ([question(i) for i in range(4)], "option_text", ["expected", "found 4"]),
        ([question(1)] * 9, "option_text", ["found 1"]),
        ([question(1), question(2, question="half \ud800")], "option_text", [":2: question: expected a text, found half"]),
        ([question(1, options=["this", "\udfff"])], "option_text", [":1: options: expected a text, found half"]),
        ([question(1, answer=10**4000)], "option_text", [":1: answer: expected an index from 0 to 1, found 1000"]),
        ([question(1, options=["this", float("nan")])], "option_text", [":1: options: expected a text or a number, found nan"]),
        ([question(1, options=["this", None])], "option_text", [":1: options: expected a text, found NoneType"]),
        ([question(1, options=["x"] * 10**6)], "option_text", [":1: options: expected 2 to 26 options, found 1000000"]),
        ([{"a\nb": 1}], "option_text", [":1: question: expected a column 'question', found columns 'a\\nb'"]),
    ],
    ids=[
        "empty",
        "no object",
        "no column",
        "no option",
        "no index",
        "blank",
        "unparsable",
        "too few",
        "duplicates",
        "surrogate",
        "surrogate option",
        "digits",
        "nan",
        "null",
        "many options",
        "line end in a column",
    ],
)
def test_questions_that_cannot_be_used(
    project: Project, run: Run, tmp_path: Path, rows: list[Any], scoring: str, words: list[str]
) -> None:
    project.set(SMALL | {"prepare.tasks.own": suite(jsonl(tmp_path / "own.jsonl", rows), scoring)})
    project.refused(run("stages/prepare.py"), "data", "own", *words)


@pytest.mark.graph
@pytest.mark.parametrize(
    "line",
    [
        b"{", b"\xff\xfe", b'{"question": NaN,}', b"[" * 100_000, b'{"question": "\xed\xa0\x80"}', gzip.compress(b"{}"),
        '{"question": 1}'.encode("utf-16"), b"9" * 5000,
    ],
    ids=["cut", "no text", "comma", "deep", "surrogate", "gzip", "utf-16", "digits"],
)  # fmt: skip
def test_a_line_that_is_no_json(project: Project, run: Run, tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(json.dumps(question(1)).encode() + b"\n\n" + line)
    project.set(SMALL | {"prepare.tasks.own": suite(str(path))})
    result = run("stages/prepare.py")
    project.refused(result, "data", "own.jsonl:3: line: expected JSON", "one JSON object per line, in UTF-8")


@pytest.mark.graph
@pytest.mark.parametrize("kind", ["folder", "pipe", "long line", "too long a name", "corpus"])
def test_a_file_of_questions_or_texts_that_is_none(project: Project, run: Run, tmp_path: Path, kind: str) -> None:
    path, said = tmp_path / "own.jsonl", "own.jsonl: file: expected a readable .jsonl file, found a folder, a pipe or a device"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "long line":
        path.write_bytes(b'{"question": "' + b"x" * 2**24 + b'"}')
        said = "own.jsonl:1: line: expected at most 16777216 bytes"
    elif kind == "too long a name":
        path, said = Path("~" + "x" * 300), "File name too long"
    if kind == "corpus":
        jsonl(path, [{"text": "one and two"}, {"text": "three \ud83d"}])
        changes, said = {"prepare.corpus.general": str(path)}, "own.jsonl:2: text: expected a text, found half of a character"
    else:
        changes = {"prepare.tasks.own": suite(str(path))}
    project.set(SMALL | changes)
    result = run("stages/prepare.py")
    assert result.returncode == 2
    project.refused(result, "data", said)


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
    result = project.run("-m", "featdiff.config.profiles", "use", "smolm2")
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
    """A project with small artifacts of prepare, base, and the arms that `intervene` reads."""
    from featdiff.language.models import save_model

    evaluation = [sample(i, split) for split in ("find", "tune", "report") for i in range(2)]
    texts = [Text("abc", "def =.", "t")] * 8
    with project.publishing("data") as folder:
        Data(list(TASKS.values()), [sample(i, "train", "m") for i in range(3)], evaluation, texts).save(folder)
    for seed, name in enumerate(("base", "sft", "grpo", "grpo_1", "grpo_2")):
        with project.publishing(f"models/{name}") as folder:
            save_model(make_model(seed), tokenizer, folder)
    project.set({"activations.tokens": 40, "activations.checkpoint_tokens": 20, "crosscoder.training.batch_tokens": 10})
    project.set({"evaluate.bootstrap": 10})
    return project


def configured(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return change


def piped(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def linked(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "blob")
    (folder / "model.safetensors").symlink_to("../blob")


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
        (lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 99), ["model.safetensors: header: expected at most"]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer"]),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), ["config.json: content: expected a JSON object"]),
        (configured(num_hidden_layers=10**5), ["config.json: num_hidden_layers: expected at most 1000, found 100000"]),
        (configured(num_hidden_layers=900), ["config.json: ", "num_hidden_layers", "900"]),
        (configured(hidden_size=10**9, vocab_size=10**9), ["config.json: sizes: expected about the"]),
        (configured(vocab_size=10**12, hidden_size=10**9), ["config.json: content: expected a causal language model"]),
        (configured(num_attention_heads="two"), ["config.json: content", "num_attention_heads"]),
        (configured(quantization_config={"quant_method": "bitsandbytes"}), ["quantization_config", "the unquantised model"]),
        (piped("tokenizer_config.json"), ["tokenizer_config.json: file: expected a file, found a broken link, a pipe"]),
        (linked, ["link: expected a file of the folder, found a link out of it; copy the folder: cp -rL"]),
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), ["given: model: expected a causal language model"]),
    ],
    ids=[
        "no folder", "no config", "no weights", "pickle", "broken", "no tokenizer", "deep", "layers", "other layers", "sizes",
        "overflow", "heads", "quantised", "pipe", "link", "tokenizer",
    ],
)  # fmt: skip
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
    from featdiff.language.models import character_tokenizer, save_model

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
                "parsed": "abc", "correct": right, "manner": "direct", "strict": right, "flexible": right,
            }
            for i in range(2)
        ]  # fmt: skip
        with study.publishing(f"evals/{name}") as folder:
            EVAL_SAMPLES.write(folder, rows)
    crosscoder = Crosscoder(["base", "sft", "grpo"], 16, 32, "batchtopk")
    crosscoder.initialise(0.1, torch.Generator().manual_seed(0))
    with study.publishing("crosscoders/joint_topk") as folder:
        crosscoder.save(folder, layer=1, seed=0)
        names = ("firing_rate", "mean_activation", "max_activation")
        save_file({name: torch.ones(32) for name in names}, folder / "features.safetensors")
    assert run("stages/activations.py", "--model", "grpo").returncode == 0

    study.set({"localize.min_flipped": 3, "localize.bootstrap": 20, "localize.seeds": [], "localize.random_dictionary": None})
    result = run("stages/localize.py")
    assert result.returncode == 0, result.stderr
    folder = study.path / "analysis/localize"
    artifact.verify(folder)
    found = artifact.read_json(folder / "features.json")
    assert (found["status"], found["features"]) == ("too_few_flipped", [])
    assert found["skipped"] == {"t": "2 flipped samples, 3 needed"}
    assert SCORES.read(folder) == []
    result = run("stages/describe.py")
    assert result.returncode == 0, result.stderr
    artifact.verify(study.path / "analysis/describe")
    described = artifact.read_json(study.path / "analysis/describe/features.json")
    assert (described["status"], described["features"]) == ("too_few_flipped", [])
    assert CONTEXTS.read(study.path / "analysis/describe") == []
    assert artifact.read_json(study.path / "analysis/describe/metrics.json")["status"] == "too_few_flipped"
    for side in ("remove", "amplify"):
        result = run("stages/intervene.py", "--side", side)
        assert result.returncode == 0, result.stderr
        assert artifact.read_json(study.path / f"analysis/intervene/{side}/metrics.json") == {"status": "too_few_flipped"}

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
    rows = EVAL_SAMPLES.read(study.path / "evals/sft")
    assert len(rows) == 6 * (1 + 2)
    assert [path.name for path in (study.path / "evals").iterdir()] == ["sft"]
