"""The helper that chooses the cases of other tests."""

import itertools

from tests.support.pairs import pairwise


def test_all_pairs_meet_in_far_fewer_cases_than_the_product() -> None:
    parameters = ("abcd", range(4), (False, True), "xyz", (None,))
    cases = pairwise(*parameters)
    for i, j in itertools.combinations(range(5), 2):
        meeting = {(case[i], case[j]) for case in cases}
        assert meeting == set(itertools.product(parameters[i], parameters[j]))
    assert len(cases) <= 20
    assert cases == pairwise(*parameters)
