from collections.abc import Iterator
from pathlib import Path

import pytest
from forge import Study, nano


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Every artifact of the nano study, computed once."""
    made = nano(tmp_path_factory.mktemp("study"))
    made.compute()
    made.keep(tmp_path_factory.mktemp("kept"))
    return made


@pytest.fixture
def study(computed: Study) -> Iterator[Study]:
    """The nano study, whole; whatever a test does to it is put right after it."""
    yield computed
    computed.mend()
