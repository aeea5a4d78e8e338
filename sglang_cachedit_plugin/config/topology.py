"""How many ranks a ``parallelism_config`` makes, and whether they are as many as the host starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import SettingError
from .section_knobs import SIZES, ULYSSES_VARIANTS


def resolve_sizes(parallelism: Mapping[str, Any], world: int, origin: str) -> dict[str, Any]:
    """``parallelism`` with every size a number.

    Args:
        world: ranks that the host starts.
        origin: where the section was given.

    Raises:
        SettingError: with the arithmetic, where the sizes do not make ``world``.
    """
    sizes = {name: parallelism.get(name, 1) for name in SIZES}
    words = " x ".join(f"{name} {parallelism[name]}" for name in SIZES if name in parallelism)
    auto = next((name for name in SIZES if sizes[name] == "auto"), None)
    product = math.prod(size for size in sizes.values() if size != "auto")
    field = auto or next(name for name in SIZES if name in parallelism)
    if auto is not None:
        if world % product:
            raise SettingError(field, "auto", origin, f"{words} does not divide {world} (--num-gpus)")
        sizes[auto] = world // product
    elif product != world:
        raise SettingError(
            field, sizes[field], origin, f"{words} makes {product} ranks, but --num-gpus is {world}"
        )
    if world == 1:
        raise SettingError(field, parallelism[field], origin, "expected --num-gpus of at least 2")
    if sizes["ulysses_size"] == 1:
        for name in ULYSSES_VARIANTS:
            if parallelism.get(name):
                raise SettingError(name, True, origin, f"ulysses_size is 1: {words} of {world} ranks")
    given = {name: size for name, size in sizes.items() if size > 1}
    return {**{key: value for key, value in parallelism.items() if key not in SIZES}, **given}
