"""The small DMD against cache-dit's, which keeps factors as large as the values."""

import pytest
import torch
from cache_dit.caching.cache_contexts.calibrators.dmd import DMDState
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_cachedit_plugin.cache import dmd
from sglang_cachedit_plugin.cache.dmd import DMDForecaster, gram

ROOTS = {
    "damped": [0.9, 0.7],
    "oscillating": [complex(0.9075, 0.2807), 0.8],
    "three": [0.99, 0.5, 0.3],
}


def series(roots, count, tokens=50, batch=2):
    generator = torch.Generator().manual_seed(1)
    modes = [torch.randn(batch, tokens, 10, dtype=torch.complex128, generator=generator) for _ in roots]
    return [sum(mode * root**k for mode, root in zip(modes, roots, strict=True)).real.float() for k in range(count)]


def fill(values, spacing, **options):
    ours, theirs = DMDForecaster(6, **options), DMDState(history=6, **options)
    for index, value in enumerate(values):
        theirs.current_step = index * spacing
        theirs.update(value)
        ours.update(-float(index * spacing), value, index * spacing)
    return ours, theirs


@pytest.mark.parametrize("name", ROOTS)
@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_equals_cache_dit(name, ahead):
    ours, theirs = fill(series(ROOTS[name], 6), spacing=2)
    theirs.current_step = 10 + ahead
    torch.testing.assert_close(ours.predict(0.0, step=10 + ahead), theirs.approximate(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ROOTS)
def test_exact_on_sums_of_exponentials(name):
    values = series(ROOTS[name], 9)
    ours, _ = fill(values[:6], spacing=1)
    for ahead in (1, 2, 3):
        torch.testing.assert_close(ours.predict(0.0, step=5 + ahead), values[5 + ahead], rtol=1e-4, atol=1e-5)


def test_batch_items_do_not_mix():
    values = series(ROOTS["damped"], 6)
    alone, _ = fill([value[:1] for value in values], spacing=1)
    together, _ = fill(values, spacing=1)
    torch.testing.assert_close(together.predict(0.0, step=7)[:1], alone.predict(0.0, step=7))


def test_tokens_of_a_packed_tensor_share_one_decomposition(monkeypatch):
    generator, fits = torch.Generator().manual_seed(2), []
    own = dmd.DMDFit
    monkeypatch.setattr(dmd, "DMDFit", lambda *args: fits.append(args) or own(*args))
    values = [value + 0.1 * torch.randn(value.shape, generator=generator)
              for value in series(ROOTS["damped"], 6, batch=1)]
    batched, _ = fill(values, spacing=1)
    packed = DMDForecaster(6)
    for index, value in enumerate(values):
        packed.update(-float(index), value[0], index)
    expected = batched.predict(0.0, step=7)
    assert len(fits) == 1
    forecast = packed.predict(0.0, step=7)
    assert len(fits) == 2
    assert torch.equal(forecast, expected[0])


def test_rank_keeps_the_strongest_modes():
    values = series(ROOTS["three"], 6)
    ours, theirs = fill(values, spacing=1, rank=1)
    theirs.current_step = 7
    torch.testing.assert_close(ours.predict(0.0, step=7), theirs.approximate(), rtol=1e-3, atol=1e-4)


def test_few_values_are_a_line_on_the_real_spacing():
    ours = DMDForecaster(6)
    slope, start = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 4.0]])
    for step, position in ((0, 1000.0), (1, 900.0)):
        ours.update(position, start + slope * position, step)
    torch.testing.assert_close(ours.predict(650.0, step=3), start + slope * 650.0)


def test_a_change_of_spacing_starts_the_window_anew():
    values = series(ROOTS["damped"], 6)
    ours = DMDForecaster(6)
    for step, value in zip([0, 1, 2, 3, 4, 7], values, strict=True):
        ours.update(-float(step), value, step)
    line = values[5] + (values[5] - values[4]) / 3
    torch.testing.assert_close(ours.predict(-8.0, step=8), line, rtol=1e-4, atol=1e-5)


def test_not_finite_values_repeat_the_newest():
    values = series(ROOTS["damped"], 5)
    values[1][0, 0, 0] = float("nan")
    ours, _ = fill(values, spacing=1)
    forecast = ours.predict(0.0, step=5)
    torch.testing.assert_close(forecast[0], values[4][0])
    assert forecast[1].isfinite().all()


def test_holds_the_values_and_nothing_else():
    values = series(ROOTS["damped"], 8)
    ours, _ = fill(values, spacing=1)
    ours.predict(0.0, step=9)
    assert ours.held_bytes() == 6 * values[0].numel() * 4
    ours.evict_oldest()
    assert ours.held_bytes() == 5 * values[0].numel() * 4


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 6), size=st.integers(1, 3000), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_gram_is_every_inner_product(count, size, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(batch, size, 1, generator=generator).bfloat16() for _ in range(count)]
    products = gram(values)
    for item in range(batch):
        for i, left in enumerate(values):
            expected = [float(left[item].double().flatten() @ right[item].double().flatten()) for right in values]
            assert products[item, i].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_room_made_before_every_value_costs_nothing_but_the_oldest():
    values = series(ROOTS["damped"], 8)
    for count in range(1, 9):
        plain, roomy = DMDForecaster(6), DMDForecaster(6)
        for step, value in enumerate(values[:count]):
            plain.update(-float(step), value, step)
            roomy.evict_oldest()
            roomy.update(-float(step), value, step)
        assert roomy.held_bytes() == plain.held_bytes()
        torch.testing.assert_close(roomy.predict(-float(count), step=count), plain.predict(-float(count), step=count))
