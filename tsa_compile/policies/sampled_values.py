"""SANTA: a decode step scores every key, and reads the values of a few that it draws by their attention. SANTA++: teams of keys.

"Stochastic value sampling", arXiv 2605.01910 v2: S values drawn by systematic sampling from the softmax and averaged are an
unbiased estimate of the attention. In the public code the samples of each tile of keys are rounded, which loses light tiles, and
every layer and step draws the same offsets; here tiles draw theirs as keys do, and by a counter that never repeats.

SANTA++, arXiv 2609.35629: keys of a page join the most similar of a few real ones; these alone are scored, and whole teams drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from tsa_compile.cache.kv_state import KvState
from tsa_compile.cache.page_teams import PageTeams
from tsa_compile.cache.sample_seed import LIMIT, SampleSeed
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.common.teams import SLOTS
from tsa_compile.kernels.decode_checks import FORMS, MAX_SAMPLES
from tsa_compile.kernels.edges import Edges
from tsa_compile.kernels.types import Draws, Selection
from tsa_compile.passes.site import AttentionSite
from tsa_compile.policies.base import Emit, Policy, check_int, own_edges
from tsa_compile.policies.exact import where

TEAMS = "teams"


@dataclasses.dataclass(frozen=True)
class SampledValues(Policy):
    """Attention of one query row, with `samples` values for each query head in place of all.

    The attention of a layer is right on average over draws (form "teams": its numerator and denominator are); the model's output
    is not, as layers are not linear. A row of up to `samples` positions is exact.

    Args:
        samples: values drawn for a query head, 1 to 4,096; of "teams" in teams of the average size. Published: 128 for "prop",
            2,048 for "flash", which loses with 256, 1,024 and 4,096 for "teams" of consecutive keys.
        form: "prop": tiles of keys get samples by their share, in two passes; "flash": all get as many, in one. Both score every
            key. "teams": the representatives of each page's teams alone are scored; the keys and values of drawn teams are read.
        representatives: of a page of 16 keys, 1 to 4; published: 4. Form "teams" alone.
        recent: last pages that "teams" reads whole, with the one that is not full; the paper reads what was generated.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    masks: ClassVar[frozenset[str]] = frozenset({"causal", "bidirectional", "data"})
    phases: ClassVar[frozenset[str]] = frozenset({"decode"})

    samples: int
    form: str = "prop"
    representatives: int = SLOTS
    recent: int = 4

    def __post_init__(self) -> None:
        check_int(self, "samples", 1, MAX_SAMPLES)
        check_int(self, "representatives", 1, SLOTS)
        check_int(self, "recent", 1)
        if self.form not in (*FORMS, TEAMS):
            raise ValueError(f"SampledValues.form must be one of {(*FORMS, TEAMS)}, got {self.form!r}")

    def refuse(self, site: AttentionSite) -> str | None:
        if site.q_len != 1:
            return f"{site.q_len} query rows: values are sampled for one"
        as_data = site.operands.mask is not None or site.mask.kind == "data"
        return "a mask as data: teams are drawn without it" if self.form == TEAMS and as_data else None

    @property
    def computes(self) -> frozenset[str]:
        """Teams are drawn by scores that are not capped."""
        return frozenset({"sinks"} if self.form == TEAMS else {"softcap", "sinks"})

    def guaranteed(self, site: AttentionSite) -> Edges:
        """Every key has a part in which values are drawn; of teams, the recent pages are read for certain."""
        if self.form != TEAMS:
            return own_edges(site)
        return Edges.bridges(PAGE, PAGE, PAGE * (self.recent - 1))

    def states(self) -> tuple[KvState, ...]:
        return (SampleSeed(), PageTeams(self.representatives)) if self.form == TEAMS else (SampleSeed(),)

    def select(self, emit: Emit, site: AttentionSite, state: Any) -> Draws:
        """`state`: the layer's "seed" and "teams"; None: torch's generator gives a seed at each call, and teams are made anew."""
        kept = state if isinstance(state, Mapping) else {}
        seed = kept.get("seed")
        if seed is None:
            seed = emit(torch.ops.aten.randint.default, LIMIT, [1], dtype=torch.int64, device=site.device)
        if self.form != TEAMS:
            return Draws(seed)
        teams, x = kept.get("teams"), site.operands
        if teams is None:
            teams = emit(torch.ops.tsa.page_teams.default, x.k, *where(emit, site), x.key_mask, self.representatives)
        return Draws(seed, teams)

    def attend(self, emit: Emit, site: AttentionSite, selection: Selection | None) -> Any:
        assert isinstance(selection, Draws)
        x, view = site.operands, where(emit, site)
        if selection.teams is not None:
            draws = max(1, self.samples * self.representatives // PAGE)
            read = (x.q, x.k, x.v, selection.teams, *view, x.key_mask, site.scale)
            return emit(torch.ops.tsa.team_attention.default, *read, selection.seed, draws, self.recent, x.sinks)[0]
        cache, masks = (x.q, x.k, x.v, *view, x.key_mask, site.scale), (x.mask, x.sinks, site.softcap)
        rule = (selection.seed, self.samples, self.form)
        return emit(torch.ops.tsa.sampled_value_attention.default, *cache, *rule, *masks)[0]
