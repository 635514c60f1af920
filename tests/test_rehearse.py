"""Rehearsals of large profiles: what is made small, and what stands in for what is not here (`make rehearse` runs one)."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from featdiff.config.data import SuiteTask
from featdiff.config.parse import parse
from featdiff.config.profiles import render_profile
from featdiff.config.reading import ConfigError, flatten, read_yaml
from featdiff.language.models import check_folder, end_tokens, load_model, load_tokenizer
from featdiff.planning.plan import of_profile
from featdiff.planning.rehearse import RULE, Rule, furnish, main, rehearsal
from featdiff.tasks.prepare import prepare
from project import ROOT

PROFILES = ["qwen3_4b", "qwen2_5_7b", "llama3_1_8b"]
PLACES = ("path", "general", "suites", "source")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def rule() -> Rule:
    return parse(Rule, read_yaml(RULE), str(RULE))


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_rehearsal_changes_numbers_and_places_alone(profile: str) -> None:
    large, small = (flatten(yaml.safe_load(text)) for text in (render_profile(profile), rehearsal(profile, rule())))
    assert large.keys() == small.keys()
    changed = {key for key in large if large[key] != small[key]}
    for key in changed:
        if not key.endswith(PLACES):
            assert number(large[key]) or all(map(number, large[key])), key
            assert number(small[key]) or all(map(number, small[key])), key
    assert not [key for key in small if str(small[key]).startswith("hub:")], "nothing is asked of the hub"
    assert {"grpo.steps", "crosscoder.training.n_features", "prepare.train_problems", "base.source"} <= changed


@pytest.mark.parametrize("profile", PROFILES)
def test_what_stands_in_can_be_read_as_what_it_stands_for(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = furnish(tmp_path, profile, rule())
    folder, large = tmp_path / study.base.source, of_profile(profile)
    check_folder(folder)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    kept = read_yaml(Path("conf/models") / large.base.source.partition("@")[0].rpartition("/")[2] / "tokens.yaml")
    assert {*end_tokens(model, tokenizer)} == {tokenizer.convert_tokens_to_ids(end) for end in kept["ends"]}
    assert model.config.num_hidden_layers == 4
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    said = tokenizer.apply_chat_template([{"role": "user", "content": "How many?"}], tokenize=False, add_generation_prompt=True)
    turn = kept["turn"]
    assert said.endswith(
        f"{turn['before']}user{turn['role_end']}How many?{turn['after']}{turn['before']}assistant{turn['role_end']}"
    )
    assert tokenizer.decode(tokenizer("There are 5 eggs.")["input_ids"], skip_special_tokens=True) == "There are 5 eggs."
    monkeypatch.chdir(tmp_path)
    made = prepare(study.prepare, study.seed)
    suites = [name for name, task in study.prepare.tasks.items() if isinstance(task, SuiteTask)]
    assert [info.name for info in made.tasks] == suites
    sizes = [study.prepare.samples.of(study.prepare.tasks[name].role) for name in suites]
    assert len(made.eval) == sum(sum(size.values()) for size in sizes)
    assert len(made.train) == study.prepare.train_problems


def test_where_stand_ins_lie_tells_what_they_are(tmp_path: Path) -> None:
    """DVC knows a base outside the repository by its path, and one rehearsal would be given what another made."""
    deeper = rule().model_copy(update={"model": rule().model | {"num_hidden_layers": 6}})
    same, other, changed = (
        {furnish(tmp_path / str(i), profile, how).base.source for i in range(2)}
        for profile, how in (("qwen3_4b", rule()), ("qwen2_5_7b", rule()), ("qwen3_4b", deeper))
    )
    assert len(same) == len(other) == len(changed) == 1
    assert len(same | other | changed) == 3


def test_a_mistake_in_the_rule_names_its_file() -> None:
    wrong = rule().model_copy(update={"params": rule().params | {"grpo": {"step": 4}}})
    with pytest.raises(ConfigError, match=r"conf/rehearsal.yaml: params: grpo: step: unknown key; did you mean steps\?"):
        rehearsal("qwen3_4b", wrong)


def test_what_cannot_be_rehearsed_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere"]) == 2
    assert "profile 'nowhere': unknown" in capsys.readouterr().err
    assert main(["pair"]) == 2
    assert "conf/models/base: config.json: expected that of /path/to/the/base, found nothing" in capsys.readouterr().err
    assert not Path(".featdiff/rehearsals/nowhere").exists()
    assert not Path(".featdiff/rehearsals/pair").exists()
