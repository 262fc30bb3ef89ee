"""The tests of tests/test_surroundings.py on the kernels."""

from tests.test_surroundings import *  # noqa: F403
