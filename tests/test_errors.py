"""Errors that a user can fix: one clear line that says what to do."""

import pytest

from engine import arguments, errors


@pytest.mark.parametrize(
    "wrong, right", [("--stepps", "--steps"), ("--dataset", "--data"), ("--nul-branch", "--null-branch")]
)
def test_a_wrong_flag_names_the_nearest_right_one(wrong, right):
    with pytest.raises(errors.UserError, match=f"there is no {wrong}; did you mean {right}"):
        arguments.parse([wrong, "3"])


def test_data_given_twice_is_all_of_it():
    assert arguments.parse(["--data", "a.tar", "--data", "b.tar"]).data == ["a.tar", "b.tar"]
