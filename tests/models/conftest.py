import pytest
from family_case import FAMILIES, FamilyCase


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyCase:
    """Each family in turn."""
    return FamilyCase.save(request.param, tmp_path_factory.mktemp(request.param) / "dense")
