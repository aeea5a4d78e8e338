"""Extrapolation is exact on polynomials up to its order, at any spacing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_cachedit_plugin.cache.forecast import Extrapolator, lagrange_weights

COEFFICIENTS = st.lists(st.floats(-4, 4), min_size=4, max_size=4)


@st.composite
def places(draw, count):
    """Distinct positions at uneven distances, in falling order as timesteps are."""
    gaps = draw(st.lists(st.floats(0.05, 0.4), min_size=count, max_size=count))
    position, result = 1.0, []
    for gap in gaps:
        result.append(position)
        position -= gap
    return result


def polynomial(coefficients: list[float], at: float) -> torch.Tensor:
    """Two different polynomials, one in each element."""
    value = sum(c * at**power for power, c in enumerate(coefficients))
    return torch.tensor([value, 1.0 - 2.0 * value], dtype=torch.float64)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), coefficients=COEFFICIENTS)
def test_exact_up_to_its_order(order, data, coefficients):
    *known, at = data.draw(places(order + 3))
    forecast = Extrapolator(order)
    for position in known:
        forecast.update(position, polynomial(coefficients[: order + 1], position).float())
    assert len(forecast) == order + 1
    expected = polynomial(coefficients[: order + 1], at)
    size = sum(abs(w) for w in lagrange_weights(known[-order - 1 :], at)) * 40
    torch.testing.assert_close(forecast.predict(at).double(), expected, rtol=0, atol=3e-7 * size)


def test_it_is_not_exact_one_order_higher():
    forecast = Extrapolator(1)
    for position in (0.0, 1.0, 3.0):
        forecast.update(position, torch.tensor([position**2]))
    assert forecast.predict(4.0).item() == pytest.approx(13.0)  # the line through 1 and 9, not 16


def test_equal_spacing_is_the_taylor_expansion_by_differences():
    forecast = Extrapolator(2)
    values = [1.0, 4.0, 2.0]
    for position, value in enumerate(values):
        forecast.update(float(position), torch.tensor([value]))
    second = values[2] - 2 * values[1] + values[0]
    assert forecast.predict(3.0).item() == pytest.approx(values[2] + (values[2] - values[1]) + second)


def test_the_order_grows_with_what_is_known():
    forecast = Extrapolator(2)
    forecast.update(0.0, torch.tensor([5.0]))
    assert forecast.predict(9.0).item() == 5.0
    forecast.update(1.0, torch.tensor([6.0]))
    assert forecast.predict(3.0).item() == pytest.approx(8.0)


def test_another_shape_starts_anew():
    forecast = Extrapolator(1)
    forecast.update(0.0, torch.zeros(2))
    forecast.update(1.0, torch.ones(2))
    forecast.update(2.0, torch.ones(3))
    assert (len(forecast), forecast.latest.shape) == (1, (3,))
    assert torch.equal(forecast.predict(5.0), torch.ones(3))
    forecast.clear()
    assert len(forecast) == 0


@pytest.mark.parametrize("known", [[(0.0, 9.0), (0.0, 1.0)], [(0.0, 9.0), (2.0, 3.0), (0.0, 1.0)]])
def test_a_position_seen_again_replaces_its_value(known):
    forecast = Extrapolator(2)
    for position, value in known:
        forecast.update(position, torch.tensor([value]))
    assert forecast.predict(0.0).item() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_stays_and_values_are_left_alone(dtype):
    first, second = torch.full((3,), 1.0, dtype=dtype), torch.full((3,), 1.5, dtype=dtype)
    forecast = Extrapolator(1)
    forecast.update(0.0, first)
    forecast.update(1.0, second)
    for _ in range(2):
        result = forecast.predict(2.0)
        assert result.dtype == dtype
        assert torch.equal(result, torch.full((3,), 2.0, dtype=dtype))
    assert torch.equal(second, torch.full((3,), 1.5, dtype=dtype))

@settings(max_examples=60, deadline=None)
@given(data=st.data(), order=st.integers(1, 3), damping=st.floats(0, 1), coefficients=COEFFICIENTS)
def test_damping_scales_each_term_of_the_polynomial(data, order, damping, coefficients):
    """Newton's form by divided differences, written out independently, with the i-th term times damping^i."""
    *known, at = data.draw(places(order + 2))
    values = [polynomial(coefficients, position) for position in known]
    forecast = Extrapolator(order, damping)
    for position, value in zip(known, values, strict=True):
        forecast.update(position, value.float())
    places_back, table = known[::-1], values[::-1]
    expected, product = torch.zeros(2, dtype=torch.float64), 1.0
    for term in range(order + 1):
        expected = expected + damping**term * table[0] * product
        product *= at - places_back[term]
        table = [
            (table[i + 1] - table[i]) / (places_back[i + term + 1] - places_back[i]) for i in range(len(table) - 1)
        ]
    size = sum(abs(w) for w in lagrange_weights(known, at)) * 80
    torch.testing.assert_close(forecast.predict(at).double(), expected, rtol=0, atol=3e-7 * size)


def test_given_weights_count_from_the_oldest_to_the_last():
    forecast = Extrapolator(1, depth=3)
    for position in range(4):
        forecast.update(float(position), torch.tensor([10.0**position]))
    assert forecast.predict(9.0, [1.0, 2.0, 3.0]).item() == pytest.approx(3210.0)
    assert forecast.predict(9.0, [2.0]).item() == pytest.approx(2000.0)
    assert forecast.predict(4.0).item() == pytest.approx(1900.0)  # the line through the last two
    assert forecast.predict(4.0, [1.0] * 4).item() == pytest.approx(1900.0)  # more weights than values
