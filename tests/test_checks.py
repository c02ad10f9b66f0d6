"""Error messages give the name, the constraint, the value and a remedy."""

import pytest
import torch

from nmt_moe.checks import check_choice, check_divides, check_range, check_shape


def test_valid_values_pass():
    check_range("top_k", 1, 1, 4)
    check_range("top_k", 4, 1, 4)
    check_range("num_experts", 7, 1)
    check_choice("gate", "softmax", ("softmax", "other"))
    check_divides("num_experts", 12, "the groups", 4)
    check_shape("x", torch.zeros(3, 2), (None, 2), "(N, D)")


@pytest.mark.parametrize(
    ("value", "low", "high", "message"),
    [
        (0, 1, None, "`size` must be at least 1, but is 0"),
        (5, 1, 4, "`size` must be from 1 to 4, but is 5"),
        (float("nan"), 0.0, 1.0, "`size` must be from 0.0 to 1.0, but is nan"),
        (float("nan"), 0.0, None, "`size` must be at least 0.0, but is nan"),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_bounds(value, low, high, message):
    with pytest.raises(ValueError, match=message):
        check_range("size", value, low, high)


def test_an_unknown_name_is_refused_with_a_list_of_known_names():
    with pytest.raises(ValueError, match="`gate` must be one of 'a', 'b', but is 'c'"):
        check_choice("gate", "c", ("a", "b"))


@pytest.mark.parametrize(("value", "message"), [(13, "Use 12 or 16"), (3, "Use 4."), (0, "Use 4.")])
def test_a_number_that_is_not_a_multiple_is_refused_with_the_nearest_multiples(value, message):
    with pytest.raises(ValueError, match=message):
        check_divides("num_experts", value, "the groups", 4)


def test_the_required_shape_is_given_in_letters_and_numbers():
    with pytest.raises(ValueError, match=r"`x` must have the shape \(N, D\) = \(any, 2\)"):
        check_shape("x", torch.zeros(3, 3), (None, 2), "(N, D)")
    with pytest.raises(ValueError, match=r"but has \(3,\)"):
        check_shape("x", torch.zeros(3), (None, 2), "(N, D)")
