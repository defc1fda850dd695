"""Does speculation give the tokens of exact decoding? Prompts of real text, greedy, draft by draft; it takes no times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from tsa_compile import api
from tsa_compile.generate.speculative import generate
from tsa_compile.learn.state import Measured
from tsa_compile.plan import Plan
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.exact import Exact
from tsa_compile.session import attached
from tsa_compile.tools.bench.acceptance import DRAFTS, TEXTS
from tsa_compile.tools.bench.lossless_contract import LosslessRow, Result, row_of

Batch = tuple[torch.Tensor, torch.Tensor]  # ids and mask, int64 [rows, longest], padded at the left


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is generated.

    Args:
        prompts: pieces of prose, of `shortest` to `longest` tokens.
        batch: rows that are generated together, of different lengths, which are near, so that little is padding.
        new: tokens of each row, unless it ends before.
        gamma: tokens of a draft.
        keys: that a draft reads at least, or a share of `share`; few, so that many drafts are refused.

    Raises:
        ValueError: a number is out of its range.
    """

    prompts: int = 100
    batch: int = 20
    shortest: int = 32
    longest: int = 96
    new: int = 12
    gamma: int = 4
    keys: int = 12
    share: float = 0.07

    def __post_init__(self) -> None:
        if not (min(self.prompts, self.batch, self.new, self.keys) >= 1 and 1 <= self.shortest <= self.longest):
            raise ValueError(f"prompts, batch, new and keys must be at least 1, and 1 <= shortest <= longest; got {self}")

    @property
    def batches(self) -> int:
        return -(-self.prompts // self.batch)


def measure(
    model: Any,
    tokenizer: Any,
    setting: Setting,
    drafts: Sequence[str],
    state: Measured,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[LosslessRow]:
    """A row for exact decoding, and one for each draft; transforms the model, and restores it.

    Args:
        drafts: keys of `DRAFTS`.
        state: batches that are in it are not run again.
        advance: called after each batch of each kind: `(2 + len(drafts)) * setting.batches` times.

    Raises:
        ValueError: no such draft, or the text has fewer tokens than the longest prompt.
    """
    if unknown := sorted(set(drafts) - set(DRAFTS)):
        raise ValueError(f"drafts must be of {list(DRAFTS)}, got {', '.join(unknown)}")
    dtype, batches = str(model.dtype).removeprefix("torch."), prompts(tokenizer, setting)

    def results(kind: str, run: Callable[[Any, Batch, Setting], Result]) -> list[Result]:
        found = []
        for n, batch in enumerate(batches):
            found.append(state.get(f"{dtype}/{kind}/{n}", lambda batch=batch: run(model, batch, setting)))  # type: ignore[misc]
            advance()
        return found

    dense = results("dense", _untouched)
    api.transform(model, Plan(prefill=Dense(), decode=Exact()))
    try:
        exact = results("exact", _exact)
        yield row_of(dtype, "exact", dense, exact, exact)
        for name in drafts:
            yield row_of(dtype, name, exact, results(name, _drafted(name)), exact)
    finally:
        api.restore(model)


def state_of(path: str | None, model: str, setting: Setting) -> Measured:
    """What is measured of a model, by its name, on this machine; a file that is there goes on.

    Raises:
        ValueError: the file is of another model, setting, device or version.
    """
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return Measured(path, {"model": model, "setting": dataclasses.asdict(setting), "device": device, **versions})


def prompts(tokenizer: Any, setting: Setting) -> list[Batch]:
    """Pieces of one text, from places that lie evenly in it."""
    text = TEXTS["prose"]()[: 12 * setting.prompts * setting.longest]
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    if len(ids) < setting.longest:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than a prompt of {setting.longest}")
    span, apart = setting.longest - setting.shortest + 1, (len(ids) - setting.longest) // setting.prompts
    rows = sorted((ids[apart * n :][: setting.shortest + 7 * n % span] for n in range(setting.prompts)), key=len)
    return [_batch(rows[n : n + setting.batch]) for n in range(0, len(rows), setting.batch)]


def _batch(rows: Sequence[torch.Tensor]) -> Batch:
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
    return ids, torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()


def _untouched(model: Any, batch: Batch, setting: Setting) -> Result:
    return {"tokens": _new_tokens(_generate(model, batch, setting), batch, setting)}


def _exact(model: Any, batch: Batch, setting: Setting) -> Result:
    """With the gap between the two largest logits at each token; 0 behind a row's end."""
    found = _generate(model, batch, setting, return_dict_in_generate=True, output_logits=True)
    best = torch.stack([logits.float().topk(2).values for logits in found.logits], 1)  # [rows, new, 2]
    return {
        "tokens": _new_tokens(found.sequences, batch, setting),
        "gaps": _filled((best[..., 0] - best[..., 1]).tolist(), setting),
    }


def _drafted(name: str) -> Callable[[Any, Batch, Setting], Result]:
    """With rows' verify steps and their tokens, and attentions of draft steps: sparse ones, and all."""

    def run(model: Any, batch: Batch, setting: Setting) -> Result:
        session = attached(model)
        assert session is not None
        session.speculation = None
        draft = DRAFTS[name](setting.share, batch[0].shape[1], setting.keys)
        found = _generate(model, batch, setting, draft=draft, gamma=setting.gamma)
        seen = session.speculation
        assert seen is not None
        counts = (seen.verified, seen.verified_tokens, seen.sparse_sites, seen.draft_sites)
        return {"tokens": _new_tokens(found, batch, setting), "seen": counts}

    return run


def _generate(model: Any, batch: Batch, setting: Setting, **how: Any) -> Any:
    ids, mask = (x.to(model.device) for x in batch)
    options: Mapping[str, Any] = dict(max_new_tokens=setting.new, do_sample=False, pad_token_id=0)
    return generate(model, ids, attention_mask=mask, **options, **how)


def _new_tokens(ids: torch.Tensor, batch: Batch, setting: Setting) -> list[list[int]]:
    return _filled(ids[:, batch[0].shape[1] :].tolist(), setting)


def _filled(rows: list[list[Any]], setting: Setting) -> list[list[Any]]:
    """As many numbers for each row, also where all rows have ended before."""
    return [[*row, *[0] * (setting.new - len(row))] for row in rows]
