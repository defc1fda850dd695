"""Speculative generation by the model itself: sparse steps draft, one exact step over all drafted tokens judges them.

The tokens are those of the model's own exact decoding: equal if greedy, of the same distribution if sampled (`accept.py`).
Vegas (arXiv 2602.07223), MagicDec (2408.11049), TriForce (2404.11912).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tsa_compile.cache.names import CACHES
from tsa_compile.generate import draft_table
from tsa_compile.generate.cached_steps import CachedSteps
from tsa_compile.generate.drafts import Draft, PolicyDraft, Request
from tsa_compile.generate.hf_generate import check_cache, check_request, result_of
from tsa_compile.generate.named_drafts import MEASURED, as_draft
from tsa_compile.generate.payoff import Cost, as_costs
from tsa_compile.generate.rounds import Rounds
from tsa_compile.generate.settle import Ends
from tsa_compile.generate.speculative_plan import plan_of, session_of
from tsa_compile.generate.token_rows import TokenRows
from tsa_compile.passes.site import VERIFY_ROWS
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy, from_dict
from tsa_compile.session import attached

GAMMA = 6


def speculative(
    draft: Policy | Plan | Draft | str,
    gamma: int | None = None,
    *,
    costs: Iterable[Cost | tuple[int, int, float, float]] | None = None,
    streamer: Any = None,
) -> Speculative:
    """What `model.generate(..., custom_generate=...)` takes: the model's own tokens, drafted by `draft` and judged by `Exact`.

    A model that was not transformed is, with dense prefill; `tsa_compile.restore(model)` undoes it. `tsa_compile.report(model)`
    says what it came to. Where the model's steps run on our cache, each row of a batch keeps the tokens that it accepted;
    otherwise all rows go on together, by the fewest, and the log says why.

    Args:
        draft: a name: "verify", the keys that the last verify step weighed most, "layer", the same by one list for a layer,
            "pages", "window", the first and the last keys, or "lookup", what followed the same tokens before; a policy for
            drafts, such as `PageSparse(keep=0.1)`; a plan, whose policies for drafts count, or, without one, those of its decode
            steps; an object of `generate.drafts`; or "measured": the draft that `tsa-compile bench round` found to be the fastest
            on this machine, for this model, nearest to the request's batch and length (`generate/draft_table.py`).
        gamma: tokens of a draft, 1 to 15; None: 6, of "measured" the fastest.
        costs: lines (batch, length, draft, verify) of what steps cost, in exact decode steps, and maybe of the tokens that a
            round gave there; speculation does not begin where it does not pay by these, and is switched off for the rest of a
            request, and the log says so, once it has lost more than a fiftieth of its steps, or rounds cost more than they
            give. None: it never is, unless the draft is "measured", whose table has such lines.
        streamer: as of `generate()`, which hands it to no function: give it to both (`tsa_compile.generate` does).

    Raises:
        ValueError, TypeError: an argument outside its range; the message names it. Of "measured", when a request begins: nothing
            was measured for the model on this machine.
    """
    made = None if draft == MEASURED else as_draft(draft)
    return Speculative(made, GAMMA if gamma is None and made is not None else gamma, as_costs(costs), streamer)


def generate(
    model: nn.Module,
    *args: Any,
    draft: Policy | Plan | Draft | str | None = None,
    gamma: int | None = None,
    costs: Iterable[Cost | tuple[int, int, float, float]] | None = None,
    **kwargs: Any,
) -> Any:
    """`model.generate(*args, **kwargs)`; by speculation, if `draft` is given: see `speculative`."""
    own: Any = model.generate
    if draft is None:
        return own(*args, **kwargs)
    recipe = speculative(draft, gamma, costs=costs, streamer=kwargs.get("streamer"))
    return own(*args, custom_generate=recipe, **kwargs)


@dataclasses.dataclass(frozen=True)
class Speculative:
    """See `speculative`. `draft` None: the one that was measured to be the fastest; `gamma` None: with its own.

    `note`: how the draft was chosen, for the report.
    """

    draft: Draft | None
    gamma: int | None
    costs: tuple[Cost, ...] = ()
    streamer: Any = None
    note: str | None = None

    def __post_init__(self) -> None:
        measured = self.draft is None and self.gamma is None
        if not measured and (type(self.gamma) is not int or not 1 <= self.gamma < VERIFY_ROWS):
            raise ValueError(f"gamma must be an int from 1 to {VERIFY_ROWS - 1}, got {self.gamma!r}")

    def chosen(self, model: Any, batch: int, length: int) -> Speculative:
        """With the draft that was measured to be the fastest for a request.

        Raises:
            ValueError: nothing was measured for such a model on this machine.
        """
        session = attached(model)
        compiler = "eager" if session is None else session.backend.compiler
        found, costs = draft_table.best(model, compiler, batch, max(1, length), self.gamma)
        draft = PolicyDraft(from_dict(dict(found.policy)))
        return dataclasses.replace(
            self, draft=draft, gamma=found.gamma, costs=self.costs or costs, note=f"by measurement: {found}"
        )

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """As decoding methods of transformers are called.

        Raises:
            ValueError: what speculation does not do is asked for.
        """
        if self.draft is None or self.gamma is None:
            told = (logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)
            return self.chosen(model, *input_ids.shape)(model, input_ids, *told, **model_kwargs)
        config, streamer = generation_config, self.streamer if streamer is None else streamer
        check_request(model, config, model_kwargs, synced_gpus)
        session = session_of(model, self.draft)
        plan = plan_of(session, self.draft)
        with session.backend.under(plan):
            outputs = model._prefill(input_ids, config, model_kwargs)
            name = next(name for name in CACHES if outputs.get(name) is not None)
            cache, room = outputs[name], config.max_length - input_ids.shape[1]
            check_cache(cache)
            cache.activate_past_recording()  # from here on, layers with a window keep what a crop may take back
            pad = getattr(config, "_pad_token_tensor", None)
            rows = TokenRows(input_ids, room + self.gamma + 1, 0 if pad is None else int(pad))
            steps = CachedSteps(model, session, cache, model_kwargs, room)
            request = Request(rows, steps, plan, logits_processor, bool(config.do_sample))
            rounds = Rounds(self.draft, self.gamma, self.costs, request, Ends(stopping_criteria, config.max_length), streamer)
            rounds.keeps_scores = config.return_dict_in_generate and (config.output_scores or config.output_logits)
            if rows.batch > 1 and config.return_dict_in_generate:
                rounds.go_together("scores and the cache of a batch are returned")
            elif rows.batch > 1 and getattr(cache, "_is_user_defined", False):
                rounds.go_together("the cache is the caller's, who reads one length for all rows")
            if self.note is not None:
                rounds.seen.notes[self.note] += 1
            rounds.run(outputs.logits[:, -1:].float())
        session.speculated(rounds.seen)
        if streamer is not None:
            streamer.end()
        return result_of(config, rows.all(), rounds.scores, name, cache)
