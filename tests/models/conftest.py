import pytest
from family_case import FamilyCase
from family_models import EVERY
from mixture_case import EVERY_MIXTURE, MixtureCase


@pytest.fixture(scope="module", params=EVERY)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyCase:
    """Each family in turn."""
    return FamilyCase.save(request.param, tmp_path_factory.mktemp(request.param) / "dense")


@pytest.fixture(scope="module", params=EVERY_MIXTURE)
def mixture(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> MixtureCase:
    """Each family with experts in turn."""
    folder = tmp_path_factory.mktemp(request.param.replace("+", "-")) / "dense"
    return MixtureCase.save(request.param, folder)
