"""The data artifact: checks, and the way to disk and back."""

from pathlib import Path

import pytest

from featdiff.artifacts.artifact import ContractError
from featdiff.tasks.task import Data, Sample, TaskInfo, Text, load_samples, load_tasks, load_texts

TASK = TaskInfo("t", "find", "questions", "option_text", "letter", "strict", False, 4)


def sample(name: str, split: str, prompt: str) -> Sample:
    return Sample(name, "t", split, prompt, "B", ("x", "y"), "why", "{}")


def test_a_round_trip_keeps_everything(tmp_path: Path) -> None:
    data = Data([TASK], [sample("a", "train", "p")], [sample("b", "find", "q")], [Text("p", "c", "s")])
    data.save(tmp_path)
    assert load_tasks(tmp_path) == {"t": TASK}
    assert load_samples(tmp_path, "train") == data.train
    assert load_samples(tmp_path, "eval") == data.eval
    assert load_texts(tmp_path, "corpus") == data.corpus


def test_samples_without_options_survive_the_round_trip(tmp_path: Path) -> None:
    plain = [Sample("a", "t", "train", "p", "1"), Sample("b", "t", "train", "q", "2")]
    Data([TASK], plain, [sample("c", "find", "r")], []).save(tmp_path)
    assert load_samples(tmp_path, "train") == plain


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Data([TASK], [sample("a", "train", "p")], [sample("b", "find", "p")], []), "only in split train"),
        (Data([TASK], [], [sample("a", "find", "p"), sample("b", "tune", "p")], []), "also in split tune"),
        (Data([TASK], [sample("a", "train", "p"), sample("a", "train", "q")], [], []), "a twice"),
        (Data([TASK], [], [sample("a", "find", "p")], [Text("p", "c", "s")]), "no evaluation prompt in a corpus"),
        (Data([TASK], [], [sample("a", "find", "p")], [], [Text("p", "c", "s")]), "no evaluation prompt in a corpus"),
    ],
)
def test_leaks_and_repeated_ids_are_errors(data: Data, said: str) -> None:
    with pytest.raises(ContractError, match=said):
        data.check()


def test_clean_data_pass() -> None:
    Data([TASK], [sample("a", "train", "p")], [sample("b", "find", "q")], [Text("p", "c", "s")]).check()


def test_right_option_is_the_letter_of_the_answer() -> None:
    assert sample("a", "find", "p").right_option == 1
    with pytest.raises(ValueError, match="no options"):
        _ = Sample("a", "t", "find", "p", "60").right_option


def test_chance_is_that_of_a_guess_among_the_options() -> None:
    assert TASK.chance == 0.25
    assert TaskInfo("t", "find", "words", "generation", "organism", "strict", False, 0).chance == 0
