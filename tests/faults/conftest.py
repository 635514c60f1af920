from pathlib import Path

import pytest
from forge import Study, nano


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Every artifact of the nano study, computed once; a test that damages one puts it back."""
    made = nano(tmp_path_factory.mktemp("study"))
    made.compute()
    return made
