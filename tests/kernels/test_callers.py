"""Run the tests of tests/api/test_surroundings.py on the kernels."""

from tests.api.test_surroundings import *  # noqa: F403
