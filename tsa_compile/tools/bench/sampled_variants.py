"""Variants of the launches on sampled values, for `tsa-compile bench decode --sweep sampled`."""

from __future__ import annotations

import functools

from tsa_compile.kernels.attend.sampled import host
from tsa_compile.kernels.attend.sampled.config import SampledConfig
from tsa_compile.kernels.types import IDENTITY
from tsa_compile.tools.bench.decode_cases import Buffers, DecodeCase
from tsa_compile.tools.bench.decode_forms import SAMPLES, Form
from tsa_compile.tools.bench.index_variants import label

MASSES = tuple(
    SampledConfig(*numbers, 64, 8)  # tiles, num_warps, num_stages, resident
    for numbers in (
        (2, 4, 4, 2), (2, 4, 3, 2), (2, 8, 4, 2), (1, 4, 4, 3), (1, 4, 3, 4), (1, 4, 3, 5), (1, 2, 4, 3), (4, 4, 4, 1),
        (4, 8, 4, 1),
    )
)  # fmt: skip
DRAWS = tuple(MASSES[0]._replace(chunk=chunk, draw_warps=warps) for chunk, warps in ((128, 8), (128, 16), (32, 8), (32, 4)))


def sampled_variants(case: DecodeCase) -> dict[str, Form]:
    """By name, the default on Hopper first: launches on all keys, then those on what is drawn."""

    def run(x: Buffers, form: str, config: SampledConfig) -> object:
        view = IDENTITY._replace(lengths=x.lengths)
        return host.attend(host.Step(x.q, x.k, x.v, view, None, None, None, x.seed, SAMPLES[form], case.scale, 0.0), form, config)

    chosen = [("prop", config) for config in (*MASSES, *DRAWS)] + [("flash", config) for config in (MASSES[0], *DRAWS)]
    return {f"{form}, {label(config)}": functools.partial(run, form=form, config=config) for form, config in chosen}
