"""`tsa-compile bench decode`: exact and page-sparse decode attention beside SDPA, checked in float64 before it is timed.

All times are from CUDA graphs whose calls go round over different layers' buffers, so that L2 does not help. The floor of a form
is the bytes it must read over the copy rate measured in the same run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from tsa_compile.kernels.attend.decode import host
from tsa_compile.kernels.attend.decode.config import DecodeConfig
from tsa_compile.kernels.attend.decode.reference import decode_attention_reference, page_attention_reference
from tsa_compile.kernels.attend.sampled.reference import sampled_value_attention_reference
from tsa_compile.kernels.attend.sampled.teams import team_attention_reference
from tsa_compile.kernels.types import IDENTITY
from tsa_compile.tools.bench.decode_cases import Buffers, DecodeCase
from tsa_compile.tools.bench.decode_forms import (
    SAMPLES,
    Form,
    Lists,
    attend,
    exact,
    exact_forms,
    page_forms,
    sampled,
    sampled_forms,
    score,
    select,
    teams_read,
)
from tsa_compile.tools.bench.index_forms import index_floors, index_forms
from tsa_compile.tools.bench.index_variants import index_variants
from tsa_compile.tools.bench.sampled_variants import sampled_variants
from tsa_compile.tools.bench.select_variants import Select, differing, select_variants
from tsa_compile.tools.bench.timing import graph_ms

Tensor = torch.Tensor
SWEEPS = ("exact", "attend", "select", "score", "refine", "complete", "sampled")
TOLERANCE = 1e-2  # relative error in bf16
VARIANTS = tuple(
    DecodeConfig(0, *numbers)  # block_n, num_warps, num_stages, resident, swap
    for numbers in (
        (64, 4, 3, 3, False), (64, 4, 3, 2, False), (64, 4, 3, 6, False), (64, 4, 4, 2, False), (64, 4, 4, 4, False),
        (64, 4, 5, 1, False), (64, 8, 3, 3, False), (64, 2, 3, 3, False), (64, 2, 4, 2, False), (32, 4, 4, 4, False),
        (32, 2, 4, 4, False), (32, 1, 4, 4, False), (32, 1, 6, 2, False), (128, 4, 2, 3, False), (128, 4, 3, 1, False),
        (128, 8, 3, 1, False), (64, 4, 3, 2, True), (64, 4, 3, 4, True), (64, 4, 2, 3, True), (128, 4, 2, 2, True),
        (128, 8, 3, 1, True),
    )
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """One case: milliseconds a call by form, floors, and relative errors against float64; `sweep` by variant of the kernel."""

    case: DecodeCase
    times: dict[str, float]
    floors: dict[str, float]
    errors: dict[str, float]
    sweep: dict[str, dict[str, float]]


def bench_decode(
    case: DecodeCase, copy_tbps: float, sweep: Sequence[str] = (), repeats: int = 15, device: str = "cuda"
) -> DecodeRow:
    """Check, then time, one case on a GPU.

    Args:
        copy_tbps: the rate of a device copy, bytes read plus written, in 10**12 a second.
        sweep: also time variants of these kernels, of SWEEPS.

    Raises:
        RuntimeError: a result is wrong; nothing is timed then.
    """
    buffers = [Buffers.random(case, device) for _ in range(case.sets)]
    errors = check(case, buffers[0])
    forms, floors = exact_forms(case, buffers[0].k.device), case.floors(copy_tbps)
    if case.rows == 1:
        forms |= page_forms(case, buffers) | index_forms(case, buffers) | sampled_forms(case)
        floors |= {name: n / copy_tbps / 1e9 for name, n in index_floors(case).items()}
    times = {name: round_ms(form, buffers, repeats) for name, form in forms.items()}
    swept = [name for name in sweep if case.rows == 1 or name == "exact"]
    found = {name: run_sweep(case, buffers, name, repeats) for name in swept}
    return DecodeRow(case, times, floors, errors, found)


def round_ms(form: Form, buffers: Sequence[Buffers], repeats: int) -> float:
    """Milliseconds a call, of a graph that calls `form` once on each of the buffers."""
    return graph_ms(lambda: [form(x) for x in buffers], repeats) / len(buffers)


# ---- correctness


def check(case: DecodeCase, x: Buffers) -> dict[str, float]:
    """Relative errors of both attentions against float64, of full and of ragged rows.

    Raises:
        RuntimeError: one is above TOLERANCE.
    """
    ragged = [case.length - 1 - (case.length // 9) * b for b in range(case.batch)]
    errors: dict[str, float] = {}
    for name, lengths in (("full", x.lengths), ("ragged", torch.tensor(ragged, dtype=torch.int32, device=x.k.device))):
        given = dataclasses.replace(x, lengths=lengths)
        forms: dict[str, Lists | str | None] = {"exact": None}
        if case.rows == 1:
            forms |= {"pages": select(case, given, score(case, given))} | {f"sampled, {form}": form for form in SAMPLES}
        errors |= {f"{form}, {name}": _error(case, given, rule) for form, rule in forms.items()}
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
    if wrong:
        raise RuntimeError(f"{case.name}: relative error above {TOLERANCE}: {wrong}; nothing is timed")
    return errors


def _error(case: DecodeCase, x: Buffers, rule: Lists | str | None) -> float:
    """Of one call of a form: pages, the name of a form of sampled values, or every key. Samples are compared draw by draw.

    The reference goes row of the batch by row, as float64 takes four times the memory; not that of samples, which counts rows and
    is in float32, as it scores keys by a kernel.
    """
    if isinstance(rule, str):
        got, want = sampled(case, x, rule)[0], sampled_reference(case, x, rule)
        return float((got.double() - want.double()).norm() / want.double().norm())
    got = exact(case, x)[0] if rule is None else attend(case, x, rule)[0]
    difference = total = 0.0
    for b in range(case.batch):
        q, k, v = (t[b : b + 1].double() for t in (x.q, x.k, x.v))
        row = (None, 1, None, x.lengths[b : b + 1], None, case.scale)
        if rule is None:
            want = decode_attention_reference(q, k, v, *row)[0]
        else:
            indices, counts = (t[b : b + 1] for t in rule)
            want = page_attention_reference(q, k, v, indices, counts, *row)[0]
        difference += float((got[b : b + 1].double() - want).square().sum())
        total += float(want.square().sum())
    return (difference / total) ** 0.5


def sampled_reference(case: DecodeCase, x: Buffers, form: str) -> Tensor:
    """What `sampled` gives, by the definition in plain PyTorch."""
    q, k, v = x.q.float(), x.k.float(), x.v.float()
    every = (None, 1, None, x.lengths, None, case.scale, x.seed)
    if form == "teams":
        return team_attention_reference(q, k, v, x.teams, *every, *teams_read())[0]
    return sampled_value_attention_reference(q, k, v, *every, SAMPLES[form], form)[0]


# ---- variants of the kernels


def run_sweep(case: DecodeCase, buffers: Sequence[Buffers], which: str, repeats: int) -> dict[str, float]:
    """Milliseconds a call of each variant of one of SWEEPS; NaN where the GPU lacks the shared memory."""
    from triton.runtime.errors import OutOfResources

    if which == "select":
        return sweep_select(case, buffers, repeats)
    if which == "sampled":
        return {name: round_ms(form, buffers, repeats) for name, form in sampled_variants(case).items()}
    if which in ("score", "refine", "complete"):
        return {name: round_ms(form, buffers, repeats) for name, form in index_variants(case, buffers, which).items()}
    lists = {id(x): select(case, x, score(case, x)) for x in buffers} if which == "attend" else {}
    queries, found = case.heads // case.kv_heads * case.rows, {}
    for variant in VARIANTS:
        config = dataclasses.replace(variant, block_m=max(16, 1 << (queries - 1).bit_length()))
        try:
            found[label(variant)] = round_ms(form_of(case, lists, config), buffers, repeats)
        except OutOfResources:
            found[label(variant)] = float("nan")
    return found


def sweep_select(case: DecodeCase, buffers: Sequence[Buffers], repeats: int) -> dict[str, float]:
    """Milliseconds a call of each variant of "select".

    Raises:
        RuntimeError: one does not make the operator's lists. Pages whose scores differ by rounding alone may be others.
    """
    scores, found = {id(x): score(case, x) for x in buffers}, {}
    for name, form in select_variants(case).items():
        made = scores[id(buffers[0])]
        if (wrong := differing(form(buffers[0], made), select(case, buffers[0], made))) > 1e-3:
            raise RuntimeError(f"{case.name}: {wrong:.1%} of the pages of variant {name!r} are others; it is not timed")
        found[name] = round_ms(functools.partial(_select_of, form, scores), buffers, repeats)
    return found


def _select_of(form: Select, scores: dict[int, Lists], x: Buffers) -> Lists:
    return form(x, scores[id(x)])


def form_of(case: DecodeCase, lists: dict[int, Lists], config: DecodeConfig) -> Form:
    """The call of a variant on a layer's buffers, of the pages in its list if it has one."""
    return lambda x: launch(case, x, lists.get(id(x)), config)


def launch(case: DecodeCase, x: Buffers, pages: Lists | None, config: DecodeConfig) -> Any:
    """Both kernels of a variant."""
    longest = case.length if pages is None else pages[0].shape[2] * host.PAGE
    view, masks = IDENTITY._replace(lengths=x.lengths), (None, None, 0.0, 0, True)
    return host.launch(x.q, x.k, x.v, view, None, case.scale, masks, longest, pages, None, config)


def label(config: DecodeConfig) -> str:
    """A variant in words; "programs": how many a multiprocessor is taken to hold."""
    words = f"keys {config.block_n}, warps {config.num_warps}, stages {config.num_stages}, programs {config.resident}"
    return words + (", swapped" if config.swap else "")


def told(row: DecodeRow) -> list[str]:
    """Lines of text: each form's time, over SDPA's and over its floor; then the best variants."""
    dense, floors = row.times["SDPA"], row.floors
    lines = [f"{row.case.name}, {row.case.sets} buffers, errors " + ", ".join(f"{n} {e:.1e}" for n, e in row.errors.items())]
    for name, ms in row.times.items():
        floor = floors.get(name, floors["exact"] if name == "SDPA" or name.startswith("exact") else None)
        over = "" if floor is None else f", {ms / floor:.2f} x its floor of {floor * 1000:.1f}"
        lines.append(f"  {name:16} {ms * 1000:8.1f} us, {ms / dense:.3f} of SDPA{over}")
    for which, found in row.sweep.items():
        ranked = sorted((ms, name) for name, ms in found.items() if ms == ms)
        lines += [
            f"  {which}: {ms * 1000:8.1f} us  {name}" for ms, name in (ranked[:6] if which in ("exact", "attend") else ranked)
        ]
    return lines
