"""SANTA: a decode step scores every key, and reads the values of a few that it draws by their attention.

"Stochastic value sampling", arXiv 2605.01910 v2: S values drawn by systematic sampling from the softmax and averaged are an
unbiased estimate of the attention. In the public code the samples of each tile of keys are rounded, which loses light tiles, and
every layer and step draws the same offsets; here tiles draw theirs as keys do, and by a counter that never repeats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from tsa_compile.cache.kv_state import KvState
from tsa_compile.cache.sample_seed import LIMIT, SampleSeed
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.decode_checks import FORMS, MAX_SAMPLES
from tsa_compile.kernels.edges import Edges
from tsa_compile.kernels.types import Draws, Selection
from tsa_compile.passes.site import AttentionSite
from tsa_compile.policies.base import Emit, Policy, check_int, own_edges
from tsa_compile.policies.exact import where


@dataclasses.dataclass(frozen=True)
class SampledValues(Policy):
    """Attention of one query row to all keys, with `samples` values for each query head in place of all.

    The attention of a layer is right on average over draws; the model's output is not, as layers are not linear. A row of up to
    `samples` positions is exact.

    Args:
        samples: values drawn for a query head, 1 to 4,096. Published: 128 for "prop", 2,048 for "flash", which loses with 256.
        form: "prop": tiles of keys get samples by their share, in two passes; "flash": all get as many, in one.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    masks: ClassVar[frozenset[str]] = frozenset({"causal", "bidirectional", "data"})
    phases: ClassVar[frozenset[str]] = frozenset({"decode"})

    samples: int
    form: str = "prop"

    def __post_init__(self) -> None:
        check_int(self, "samples", 1, MAX_SAMPLES)
        if self.form not in FORMS:
            raise ValueError(f"SampledValues.form must be one of {FORMS}, got {self.form!r}")

    def refuse(self, site: AttentionSite) -> str | None:
        return None if site.q_len == 1 else f"{site.q_len} query rows: values are sampled for one"

    def guaranteed(self, site: AttentionSite) -> Edges:
        """Every key has a part in which values are drawn."""
        return own_edges(site)

    def states(self) -> tuple[KvState, ...]:
        return (SampleSeed(),)

    def select(self, emit: Emit, site: AttentionSite, state: Any) -> Draws:
        """`state`: the layer's "seed"; None: torch's generator gives one at each call."""
        if isinstance(state, Mapping) and "seed" in state:
            return Draws(state["seed"])
        return Draws(emit(torch.ops.aten.randint.default, LIMIT, [1], dtype=torch.int64, device=site.device))

    def attend(self, emit: Emit, site: AttentionSite, selection: Selection | None) -> Any:
        assert isinstance(selection, Draws)
        x = site.operands
        cache = (x.q, x.k, x.v, *where(emit, site), x.key_mask, site.scale)
        return emit(
            torch.ops.tsa.sampled_value_attention.default, *cache, selection.seed, self.samples, self.form, x.mask, x.sinks
        )[0]
