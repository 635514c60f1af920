"""Parameters: what is refused and how, and the switch between profiles."""

import ast
import copy
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from ruamel.yaml import YAML

from featdiff.config.params import Study, load_study
from featdiff.config.parse import parse
from featdiff.config.profiles import main, render_profile, use_profile
from featdiff.config.reading import ConfigError, flatten

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = yaml.safe_load((ROOT / "conf/profiles/organism.yaml").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "conf/profiles/organism.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)


def said_about(change: dict[str, Any]) -> str:
    """The message for the default params with ``change`` (dotted keys; None as value of ``-key`` removes it)."""
    data = copy.deepcopy(DEFAULT)
    for dotted, value in change.items():
        *sections, key = dotted.removeprefix("-").split(".")
        place = data
        for section in sections:
            place = place[section]
        if dotted.startswith("-"):
            del place[key]
        else:
            place[key] = value
    with pytest.raises(ConfigError) as caught:
        parse(Study, data, "params.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("params.yaml: ")
    return message


@pytest.mark.parametrize(
    ("change", "key", "near"),
    [
        ({"sfft": {}}, "sfft", "sft"),
        ({"sft.epoch": 3}, "sft.epoch", "epochs"),
        ({"base.pretraining.d_modle": 3}, "base.pretraining.d_modle", "d_model"),
        ({"prepare.tasks.add.rolle": "find"}, "prepare.tasks.add.rolle", "role"),
        ({"crosscoder.fits.joint_l1.los": "l1"}, "crosscoder.fits.joint_l1.los", "loss"),
    ],
)
def test_a_typo_names_the_key_and_the_nearest_one(change: dict[str, Any], key: str, near: str) -> None:
    assert said_about(change).startswith(f"params.yaml: {key}: unknown key; did you mean {near}?")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sft.epochs": "many"}, ["sft.epochs", "number", "'many'"]),
        ({"sft.lr": "1e-3"}, ["sft.lr", "'1e-3'", "decimal point"]),
        ({"sft.batch_size": 2.5}, ["sft.batch_size", "integer", "2.5"]),
        ({"sft.batch_size": True}, ["sft.batch_size", "integer", "True"]),
        ({"sft.lr": float("nan")}, ["sft.lr"]),
        ({"sft.lr": float("inf")}, ["sft.lr", "finite"]),
        ({"sft.lr": 0.0}, ["sft.lr", "greater than 0"]),
        ({"localize.threshold": 1.5}, ["localize.threshold", "less than or equal to 1"]),
        ({"prepare.teacher": "own_wording"}, ["prepare.teacher", "'own' or 'foreign'", "own_wording"]),
        ({"prepare.tasks.add.role": "tran"}, ["prepare.tasks.add.role:", "'train'", "tran"]),
        ({"prepare.tasks.add.source": "famly"}, ["prepare.tasks.add:", "famly", "'family'"]),
        (
            {"prepare.tasks.Add": {"source": "family", "role": "find"}},
            ["prepare.tasks.Add: a name is 1 to 40 lowercase letters", "(found 'Add')"],
        ),
        ({"activations.layer": "midle"}, ["activations.layer:", "integer", "'middle'", "'midle'"]),
        ({"crosscoder.fits.joint_l1.models": ["base", "rl", "sft"]}, ["crosscoder.fits.joint_l1.models: 'rl' is no arm"]),
        (
            {"crosscoder.fits.joint_l1.models": ["base", "sft"]},
            ["fits.joint_l1.models has 2 entries, not 3", "crosscoder.wide"],
        ),
        ({"arms.ppo": {"method": "ppo"}}, ["arms.ppo.method: no method; did you mean dpo?", "'ppo'"]),
        ({"arms.Sft": {"method": "sft"}}, ["arms.Sft: a name is 1 to 40 lowercase letters"]),
        ({"arms.base": {"method": "sft"}}, ["arms.base: this name is taken"]),
        ({"arms.theirs": {"method": "imported"}}, ["arms.theirs.source: missing"]),
        ({"arms.own": {"method": "sft", "lrr": 0.1}}, ["arms.own.lrr: unknown key; did you mean lr?"]),
        ({"arms.own": {"method": "sft", "lr": -0.1}}, ["arms.own: lr:", "greater than 0", "-0.1"]),
        ({"noise.size": 0.0}, ["noise.size:", "greater than 0"]),
        ({"arms.noisy": {"method": "noise", "size": 11.0}}, ["arms.noisy: size:", "less than or equal to 10", "11.0"]),
        ({"arms": {}}, ["arms:", "at least 1"]),
        ({"roles.tuned": "gpro"}, ["roles: 'gpro' is no arm; did you mean grpo?"]),
        ({"roles.contrast": "grpo"}, ["roles: original, tuned and contrast are different models"]),
        ({"roles.tuned": "rft"}, ["localize.fit = joint_topk does not hold rft"]),
        ({"dynamics": None}, ["dynamics:"]),
        ({"-seed": None}, ["seed: missing"]),
        ({"-grpo.beta": None}, ["grpo.beta: missing"]),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found(change: dict[str, Any], words: list[str]) -> None:
    message = said_about(change)
    for word in words:
        assert word in message


def test_sizes_beyond_any_study_are_refused_and_generous_ones_are_not() -> None:
    """A study of 8B models: 400 million tokens, a million features."""
    for key, value in flatten(DEFAULT).items():
        if isinstance(value, int) and not isinstance(value, bool):
            assert said_about({key: 10**12}).startswith(f"params.yaml: {key}: "), key
    large = copy.deepcopy(DEFAULT)
    large["activations"] |= {"tokens": 4 * 10**9, "checkpoint_tokens": 10**6, "max_length": 32_768}
    large["crosscoder"]["training"] |= {"n_features": 10**7, "batch_tokens": 65_536, "steps": 4_000_000}
    large["prepare"] |= {"train_problems": 10**6}
    large["prepare"]["corpus"] |= {"texts": 4 * 10**7}
    parse(Study, large, "params.yaml")


@pytest.mark.parametrize("name", ["abc\n", "", "1a", "a-b", "../a", "é", "a" * 41, "a\0", "A"])
def test_a_name_is_held_to_one_pattern_wherever_it_stands(name: str) -> None:
    for change in (
        {"profile": name}, {"localize.fit": name}, {"localize.seeds": [name]}, {"dynamics.fit": name},
        {"dynamics.arms": [name]}, {"roles.tuned": name}, {"roles.contrast": name},
    ):  # fmt: skip
        assert f"a name is 1 to 40 lowercase letters, digits and underscores, and starts with a letter (found {name!r})" in (
            said_about(change)
        )
    for table in (
        lambda data: data["prepare"]["tasks"],
        lambda data: data["crosscoder"]["fits"],
        lambda data: data["arms"],
    ):
        data = copy.deepcopy(DEFAULT)
        entries = table(data)
        entries[name] = next(iter(entries.values()))
        with pytest.raises(ConfigError, match="a name is 1 to 40 lowercase letters") as caught:
            parse(Study, data, "params.yaml")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base.pretraining.heads": 5}, ["base.pretraining", "d_model = 96 over heads = 5"]),
        ({"base.pretraining.heads": 96}, ["base.pretraining", "even width"]),
        ({"base.pretraining.batch_tokens": 100}, ["base.pretraining", "less than one row"]),
        ({"base.pretraining.d_model": 10**6}, ["base.pretraining", "at most 1e9"]),
        ({"crosscoder.training.k": 1000}, ["crosscoder.training", "more than n_features = 768"]),
        ({"report.alpha": 0.0}, ["report.alpha", "greater than 0"]),
        ({"evaluate.confidence": 1.0}, ["evaluate.confidence", "less than 1"]),
        ({"sft.epochs": 1e300}, ["sft.epochs"]),
        (
            {"prepare.tasks.gcd": {"source": "reasoning_gym", "role": "find", "dataset": "gcd", "instruction": "",
                                   "options": {"max_digits": 10**9}}},
            ["prepare.tasks.gcd", "options.max_digits = 1000000000 is beyond a million"],
        ),
    ],
)  # fmt: skip
def test_values_that_no_stage_could_use(change: dict[str, Any], words: list[str]) -> None:
    message = said_about(change)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"localize.fit": "joint_top"}, ["localize.fit = joint_top", "did you mean joint_topk?"]),
        ({"grpo.steps": 251}, ["grpo", "steps = 251", "checkpoints = 5"]),
        ({"grpo.micro_batch_size": 100}, ["grpo", "128", "micro_batch_size = 100"]),
        ({"prepare.tasks": {"sort": {"source": "family", "role": "find"}}}, ["prepare", "role: train"]),
        ({"prepare.tasks": {"add": {"source": "family", "role": "train"}}}, ["prepare", "role: find"]),
        (
            {"activations.checkpoint_tokens": 1076},  # of which 5 % are held out
            ["activations.checkpoint_tokens = 1076 leaves 1023", "crosscoder.training.batch_tokens = 1024"],
        ),
        (
            {"crosscoder.training.batch_tokens": 120_000},
            ["activations.tokens = 120000 leaves 114000", "crosscoder.training.batch_tokens = 120000"],
        ),
    ],
)
def test_values_that_do_not_go_together(change: dict[str, Any], words: list[str]) -> None:
    message = said_about(change)
    for word in words:
        assert word in message


def test_an_arm_changes_numbers_of_its_method_and_repeats_differ_in_the_seed_alone() -> None:
    data = copy.deepcopy(DEFAULT)
    data["arms"] |= {"own": {"method": "sft", "teacher": "own"}, "own_1": {"method": "sft", "teacher": "own", "seed": 4}}
    study = parse(Study, data, "params.yaml")
    assert study.numbers("own").model_dump() == DEFAULT["sft"] | {"teacher": "own"}
    assert study.repeats("own_1") == ["own", "own_1"]
    assert study.repeats("sft") == ["sft", "sft_1", "sft_2"]
    assert study.repeats("base") == ["base"]
    assert study.fits["pair_own_1"].models == ["base", "own_1"]
    assert {name for name in study.fits if study.null(name)} == {"null_base", "null_sft", "null_grpo"}


def test_models_of_a_study_have_one_dtype() -> None:
    said = said_about({"base.dtype": "bfloat16"})
    assert "base.dtype = bfloat16, and arms.sft is float32, as all that are trained here; make the two equal" in said
    brought = {"method": "imported", "source": "there", "dtype": "bfloat16"}
    said = said_about({"arms.brought": brought})
    assert "base.dtype = float32, and arms.brought is bfloat16, as imported; make the two equal" in said


def test_low_rank_changes_that_are_wrong_are_named() -> None:
    right = {"rank": 2, "alpha": 4.0, "targets": ["q_proj"]}
    for section, begin in (("sft", "sft."), ("arms.sft", "arms.sft: ")):
        assert f"{begin}lora.targets.0: the last part of a" in said_about({f"{section}.lora": right | {"targets": ["a; b"]}})
        assert f"{begin}lora.rnak: unknown key" in said_about({f"{section}.lora": {"rnak": 2, **right}})
        assert f"{begin}lora.rank" in said_about({f"{section}.lora": right | {"rank": 0}})


def test_a_study_needs_no_contrast() -> None:
    data = copy.deepcopy(DEFAULT)
    data["roles"]["contrast"] = None
    assert parse(Study, data, "params.yaml").roles.models == ["base", "grpo"]


def test_tokens_that_give_exactly_one_batch_are_enough() -> None:
    data = copy.deepcopy(DEFAULT)
    data["activations"]["checkpoint_tokens"] = 1077
    parse(Study, data, "params.yaml")


def test_several_mistakes_are_counted() -> None:
    assert said_about({"sft.epoch": 3, "grpo.stepps": 1}).endswith("[and 1 more]")


@pytest.mark.parametrize("text", ["seed: [", "- a\n", "", "\tseed: 1"])
def test_a_file_that_is_no_mapping(text: str) -> None:
    Path("params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^params\.yaml: ") as caught:
        load_study()
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_or_not_there() -> None:
    Path("params.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_study()
    Path("params.yaml").unlink()
    with pytest.raises(ConfigError, match="not found; run from the project's top folder"):
        load_study()


def test_a_section_is_checked_with_the_whole_file() -> None:
    study = load_study()
    assert (study.sft.model_dump(), study.seed) == (DEFAULT["sft"], DEFAULT["seed"])
    text = Path("params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(text.replace("n_features: 768", "n_feature: 768"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"crosscoder\.training\.n_feature"):
        load_study()


def test_params_cannot_be_changed_once_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_study().sft.lr = 1.0


def test_no_class_holds_a_default() -> None:
    sections = ("values", "data", "models", "dictionary", "sets", "report", "params")
    bodies = [ast.parse((ROOT / f"src/featdiff/config/{name}.py").read_text(encoding="utf-8")).body for name in sections]
    of_params = {"Params"}
    fields = []
    for node in chain.from_iterable(bodies):
        if isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) and base.id in of_params for base in node.bases):
            of_params.add(node.name)  # those that inherit from it hold none either
            fields += [(node.name, line) for line in node.body if isinstance(line, ast.AnnAssign)]
    assert {"RFTParams", "DPOParams"} <= of_params
    assert len(fields) > 100
    held = [(name, ast.unparse(line.target)) for name, line in fields if line.value is not None]
    of_unused_losses = ("dedicated_share", "delta_share", "delta_weight")
    assert held == [("Fit", "source"), *(("CrosscoderTraining", field) for field in of_unused_losses)]
    constraints = [call for _, line in fields for call in ast.walk(line.annotation) if isinstance(call, ast.Call)]
    allowed = {"gt", "ge", "lt", "le", "pattern", "min_length", "max_length", "discriminator"}
    assert {keyword.arg for call in constraints for keyword in call.keywords} <= allowed


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/profiles").glob("*.yaml")))
def test_every_profile_renders_and_parses(name: str) -> None:
    text = render_profile(name)
    study = parse(Study, yaml.safe_load(text), name)
    assert study.profile == name
    assert YAML(typ="safe").load(text) == yaml.safe_load(text), "DVC reads it with another parser, which is stricter"
    overrides = yaml.safe_load(Path(f"conf/profiles/{name}.yaml").read_text(encoding="utf-8"))
    assert flatten(study.model_dump()).keys() >= {key for key in flatten(overrides) if "!" not in key and key != "extends"}
    if name != "organism":
        assert text.count("#") >= 10  # the comments of the default survive


def test_a_profile_that_extends_another_differs_from_it_in_what_it_says() -> None:
    Path("conf/profiles/mine.yaml").write_text("extends: nano\nseed: 7\nsft: {lr: 0.25}\n")
    of_nano, mine = (flatten(yaml.safe_load(render_profile(name))) for name in ("nano", "mine"))
    assert {key for key in mine if of_nano.get(key) != mine[key]} == {"profile", "seed", "sft.lr"}
    assert of_nano.keys() == mine.keys()
    over = flatten(yaml.safe_load(render_profile("mine", over={"sft": {"lr": 0.5}})))
    assert {key for key in over if over[key] != mine[key]} == {"sft.lr"}


@pytest.mark.parametrize("further", ["mine", "second", "organism", "nowhere", "../profiles/nano", "[nano]"])
def test_a_profile_extends_one_that_extends_none(further: str) -> None:
    Path("conf/profiles/second.yaml").write_text("extends: nano\n")
    Path("conf/profiles/mine.yaml").write_text(f"extends: {further}\n")
    with pytest.raises(ConfigError, match=r"conf/profiles/mine.yaml: extends: .*no profile that extends none"):
        render_profile("mine")


def test_the_file_in_force_is_the_rendering_of_its_profile() -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    if (profile := yaml.safe_load(text)["profile"]) != "organism":
        pytest.skip(f"params.yaml is switched to {profile}")
    assert text == render_profile("organism")


def test_a_profile_changes_what_it_names_and_nothing_else() -> None:
    Path("conf/profiles/mine.yaml").write_text("sft: {lr: 0.25}\nprepare:\n  tasks!:\n    add: {source: family, role: train}\n")
    with pytest.raises(ConfigError, match=r"conf/profiles/mine.yaml: prepare: no task has role: find"):
        render_profile("mine")
    Path("conf/profiles/mine.yaml").write_text("sft: {lr: 0.25}\nreport: {max_samples_shown: 3}\n")
    before, after = flatten(DEFAULT), flatten(yaml.safe_load(render_profile("mine")))
    assert {key for key in before if before[key] != after[key]} == {"profile", "sft.lr", "report.max_samples_shown"}
    assert before.keys() == after.keys()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sft: {lrr: 1.0}", ["mine.yaml: sft: lrr: unknown key; did you mean lr?"]),
        ("stf: {lr: 1.0}", ["mine.yaml: stf: unknown key; did you mean sft?"]),
        ("sft: {lr: fast}", ["mine.yaml: sft.lr", "'fast'"]),
        ("sft: {lr: 1.0}\nsft: {lr: 2.0}", ["mine.yaml: not valid YAML: key 'sft' is given twice; keep one at line 2"]),
        ("", ["mine.yaml: expected a mapping"]),
        ("sft: &a {lr: 1.0}\ngrpo: *a", ["mine.yaml:1: anchors (&), aliases (*) and tags (!) are not read"]),
        ("prepare: {tasks: {}, tasks!: {}}", ["mine.yaml: not valid YAML: key 'tasks' is given twice"]),
        ("sft: {<<: {lr: 1.0}}", ["mine.yaml: not valid YAML: expected a text as key"]),
        ("sft: {lr: 1.0, 1: 2}", ["mine.yaml: not valid YAML: expected a text as key"]),
        ("a: " * 50, ["mine.yaml"]),
        ("sft: " + "[" * 40 + "]" * 40, ["mine.yaml:1: nested more than 32 deep"]),
    ],
)
def test_a_profile_with_a_mistake(text: str, words: list[str]) -> None:
    Path("conf/profiles/mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        use_profile("mine")
    for word in words:
        assert word in str(caught.value)
    assert Path("params.yaml").read_bytes() == (ROOT / "conf/profiles/organism.yaml").read_bytes()


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"profile 'nanno': unknown; did you mean nano\?"):
        use_profile("nanno")
    with pytest.raises(ConfigError, match="unknown"):
        use_profile("../profiles/nano")


def test_switching_there_and_back_gives_the_same_bytes() -> None:
    before = Path("params.yaml").read_bytes()
    assert use_profile("nano") == "params.yaml: now profile nano"
    assert load_study().profile == "nano"
    assert use_profile("nano") == "params.yaml: already profile nano"
    use_profile("organism")
    assert Path("params.yaml").read_bytes() == before


def test_edits_by_hand_are_named_and_kept() -> None:
    use_profile("nano")
    edited = Path("params.yaml").read_text(encoding="utf-8").replace("teacher: foreign", "teacher: own")
    Path("params.yaml").write_text(edited, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"1 edit\(s\) by hand over profile nano \(prepare\.teacher\).*DISCARD=1"):
        use_profile("organism")
    assert Path("params.yaml").read_text(encoding="utf-8") == edited
    assert use_profile("organism", discard_edits=True) == "params.yaml: now profile organism"
    assert load_study().prepare.teacher == "foreign"


@pytest.mark.parametrize(
    "edit", [("  lr: ", "  lrr: "), ("    direct_right_share: 0.05\n", ""), ("    sort: {source: family, role: find}\n", "")]
)
def test_added_and_removed_keys_are_edits_too(edit: tuple[str, str]) -> None:
    text = Path("params.yaml").read_text(encoding="utf-8")
    assert text.count(edit[0]) >= 1
    Path("params.yaml").write_text(text.replace(edit[0], edit[1], 1), encoding="utf-8")
    with pytest.raises(ConfigError, match="by hand over profile organism"):
        use_profile("nano")


def test_a_place_of_suites_is_no_edit_by_hand() -> None:
    use_profile("nano", suites="../copies")
    assert load_study().prepare.suites == "../copies"
    assert use_profile("nano", suites="../copies") == "params.yaml: already profile nano"
    main(["use", "--suites=../others"])  # as make repro SUITES=… without a profile does
    assert (load_study().profile, load_study().prepare.suites) == ("nano", "../others")
    use_profile("organism")
    assert load_study().prepare.suites == "hub"


def test_discarding_also_leaves_a_file_that_cannot_be_read() -> None:
    for broken in ("profile: nosuch\n", "seed: ["):
        Path("params.yaml").write_text(broken, encoding="utf-8")
        with pytest.raises(ConfigError):
            use_profile("nano")
        use_profile("nano", discard_edits=True)
        assert load_study().profile == "nano"


def test_without_params_a_profile_is_written() -> None:
    Path("params.yaml").unlink()
    use_profile("nano")
    assert load_study().profile == "nano"


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["use", "nano"])
    main(["check"])
    assert capsys.readouterr().out == "params.yaml: now profile nano\nparams.yaml: profile nano, all keys known\n"
    for arguments in (["use", "nosuch"], ["switch"], []):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("featdiff: ")
        assert said.count("\n") == 1


def test_reading_params_needs_no_torch() -> None:
    heavy = ("torch", "numpy", "mlflow", "ruamel")
    code = f"import sys, featdiff.config.params; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base.source", "https://me:hunter2@models.example/x"),
        ("report.title", "hf_abcdefghijklmnopqrstuv"),
        ("prepare.tasks.add.api_key", "anything"),
        ("report.about", "AKIAABCDEFGHIJKLMNOP is mine"),
    ],
)
def test_what_looks_like_a_key_is_refused_and_not_repeated(tmp_path: Path, key: str, value: str) -> None:
    params = yaml.safe_load((ROOT / "conf/profiles/organism.yaml").read_text(encoding="utf-8"))
    place = params
    for part in key.split(".")[:-1]:
        place = place[part]
    place[key.rpartition(".")[2]] = value
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{key}: looks like a key or a password") as refused:
        load_study(path)
    assert value not in str(refused.value)


def test_numbers_of_tokens_are_no_secrets() -> None:
    load_study(ROOT / "params.yaml")  # row_tokens, max_new_tokens and others
