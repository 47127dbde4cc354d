import pytest
from family_case import FamilyCase
from family_models import EVERY


@pytest.fixture(scope="module", params=EVERY)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyCase:
    """Each family in turn."""
    return FamilyCase.save(request.param, tmp_path_factory.mktemp(request.param) / "dense")
