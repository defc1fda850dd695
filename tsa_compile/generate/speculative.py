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
from tsa_compile.generate.cached_steps import CachedSteps
from tsa_compile.generate.drafts import Draft, Request, as_draft
from tsa_compile.generate.hf_generate import check_cache, check_request, result_of
from tsa_compile.generate.payoff import Cost, as_costs
from tsa_compile.generate.rounds import Rounds
from tsa_compile.generate.settle import Ends
from tsa_compile.generate.speculative_plan import plan_of, session_of
from tsa_compile.generate.token_rows import TokenRows
from tsa_compile.passes.site import VERIFY_ROWS
from tsa_compile.policies.base import Policy


def speculative(
    draft: Policy | Draft | str,
    gamma: int = 6,
    *,
    costs: Iterable[Cost | tuple[int, int, float, float]] | None = None,
    streamer: Any = None,
) -> Speculative:
    """What `model.generate(..., custom_generate=...)` takes: the model's own tokens, drafted by `draft` and judged by `Exact`.

    A model that was not transformed is, with dense prefill; `tsa_compile.restore(model)` undoes it. `tsa_compile.report(model)`
    says what it came to. Where the model's steps run on our cache, each row of a batch keeps the tokens that it accepted;
    otherwise all rows go on together, by the fewest, and the log says why.

    Args:
        draft: a policy for drafts, such as `PageSparse(keep=0.07)`; "lookup": what followed the same tokens before; "window": the
            first and the last keys; or an object of `generate.drafts`.
        gamma: tokens of a draft, 1 to 15.
        costs: lines (batch, length, draft, verify) of what steps cost, in exact decode steps, and maybe of the tokens that a
            round gave there; speculation does not begin where it does not pay by these, and is switched off for the rest of a
            request, and the log says so, once it has lost more than a fiftieth of its steps, or rounds cost more than they
            give. None: it never is.
        streamer: as of `generate()`, which hands it to no function: give it to both (`tsa_compile.generate` does).

    Raises:
        ValueError, TypeError: an argument outside its range; the message names it.
    """
    return Speculative(as_draft(draft), gamma, as_costs(costs), streamer)


def generate(
    model: nn.Module,
    *args: Any,
    draft: Policy | Draft | str | None = None,
    gamma: int = 6,
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
    """See `speculative`."""

    draft: Draft
    gamma: int
    costs: tuple[Cost, ...] = ()
    streamer: Any = None

    def __post_init__(self) -> None:
        if type(self.gamma) is not int or not 1 <= self.gamma < VERIFY_ROWS:
            raise ValueError(f"gamma must be an int from 1 to {VERIFY_ROWS - 1}, got {self.gamma!r}")

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
        config, streamer = generation_config, self.streamer if streamer is None else streamer
        check_request(model, config, model_kwargs, synced_gpus)
        session = session_of(model, self.draft.policy)
        plan = plan_of(session, self.draft.policy)
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
            rounds.run(outputs.logits[:, -1:].float())
        session.speculated(rounds.seen)
        if streamer is not None:
            streamer.end()
        return result_of(config, rows.all(), rounds.scores, name, cache)
