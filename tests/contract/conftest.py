"""The bindings, described once for all contract tests."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.contract.real_bindings import ALL, Missing, Stubs, make_stubs


@pytest.fixture(scope="session")
def stubs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stubs]:
    """Return the stubs of a version; where they cannot be had, skip, or fail in continuous integration."""
    made: dict[str, Stubs | Missing] = {}

    def get(version: str) -> Stubs:
        if version not in made:
            try:
                made[version] = make_stubs(version, tmp_path_factory.mktemp(f"stubs-{version}"))
            except Missing as reason:
                made[version] = reason
        found = made[version]
        if isinstance(found, Missing):
            if os.environ.get("CI") == "true":
                pytest.fail(f"contract tests must run in continuous integration: {found}")
            pytest.skip(str(found))
        return found

    return get


@pytest.fixture(params=ALL)
def stubs(request: pytest.FixtureRequest, stubs_of: Callable[[str], Stubs]) -> Stubs:
    """One version after the other."""
    return stubs_of(request.param)


@pytest.fixture(scope="session")
def all_stubs(stubs_of: Callable[[str], Stubs]) -> list[Stubs]:
    """Every version."""
    return [stubs_of(version) for version in ALL]
