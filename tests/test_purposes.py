"""What is asked of a set, by the roles of the models."""

from featdiff.config.models import Roles
from featdiff.intervention.purposes import needed, purposes, sign_of

ROLES = Roles(original="raw", tuned="rl", contrast="imitator")


def test_every_role_has_its_purpose_and_every_other_run_of_the_tuned_model_one_more() -> None:
    found = purposes(ROLES, ["rl", "rl_1", "rl_2"])
    assert [(each.name, each.model, each.toward, each.sign, each.chosen) for each in found] == [
        ("zero_tuned", "rl", "raw", -1, True),
        ("zero_contrast", "imitator", "raw", -1, False),
        ("amplify_original", "raw", "rl", 1, True),
        ("repeat_rl_1", "rl_1", "raw", -1, False),
        ("repeat_rl_2", "rl_2", "raw", -1, False),
    ]
    assert [sign_of(each.name) for each in found] == [each.sign for each in found]


def test_without_a_contrast_or_repeats_there_is_no_purpose_of_them() -> None:
    alone = Roles(original="raw", tuned="rl", contrast=None)
    assert [each.name for each in purposes(alone, ["rl"])] == ["zero_tuned", "amplify_original"]
    assert purposes(alone, []) == purposes(alone, ["rl"])


def test_a_model_has_its_own_slot_and_a_repeat_else_that_of_the_tuned_model() -> None:
    *_, contrast, _, repeat = purposes(ROLES, ["rl", "rl_1"])
    assert repeat.slot_in(["raw", "rl"]) == "rl"
    assert repeat.slot_in(["raw", "rl", "rl_1"]) == "rl_1"
    assert contrast.slot_in(["raw", "imitator", "rl"]) == "imitator"
    assert contrast.slot_in(["raw", "rl"]) is None, "another model's slot says nothing of the contrast"


def test_each_side_has_its_purposes_and_needs_both_models_for_which_settings_are_chosen() -> None:
    found = purposes(ROLES, ["rl", "rl_1"])
    assert {each.name: each.side for each in found} == {
        "zero_tuned": "remove", "zero_contrast": "remove", "repeat_rl_1": "remove", "amplify_original": "amplify"
    }  # fmt: skip
    assert needed("remove", found) == found
    assert [each.name for each in needed("amplify", found)] == ["zero_tuned", "amplify_original"]
