"""Decode policies on models that are spread: heads (transformers' `tp_plan`), weights (FSDP2), layers (accelerate).

On a CPU by two gloo processes, on GPUs by the same functions in a torchrun job of two. Tokens are those of one process by
design's contract: with `Exact` and `keep=1.0` the dense model's, with fewer pages those of the same policy on one process.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tsa_compile as tsa
from tests.cache.models import tiny, token_ids
from tests.cache.test_generate import generate
from tests.ranks import run_ranks
from tsa_compile.parallel import head_group
from tsa_compile.steps import FIXED, REPLAYED

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
POLICIES = (tsa.Exact(), tsa.PageSparse(keep=1.0), tsa.PageSparse(keep=0.4, recent=1))
MASK = torch.ones(2, 200, dtype=torch.long)
MASK[0, :37] = 0
NEW = 8


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """pytest keeps every message of a trace, which takes longer than the trace."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def prompt(device: Any = "cpu", seed: int = 0) -> dict[str, Any]:
    return dict(input_ids=(token_ids(200, 2, seed) * MASK).to(device), attention_mask=MASK.to(device), max_new_tokens=NEW)


def tokens(model: Any, policy: Any, call: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """What `generate` gives under a decode policy, and the report."""
    tsa.transform(model, tsa.Plan(prefill=tsa.Dense(), decode=policy))
    found = generate(model, **call).cpu()
    report = tsa.report(model)
    tsa.restore(model)
    return found, report


def all_tokens(make: Callable[[], Any], call: dict[str, Any]) -> list[torch.Tensor]:
    """By the model's own steps, and by each policy, whose steps run on fixed buffers with every attention replaced."""
    found = [generate(make(), **call).cpu()]
    for policy in POLICIES:
        out, report = tokens(make(), policy, call)
        assert sum(report.steps.get(how, 0) for how in (FIXED, REPLAYED)) == NEW - 1, report.steps
        assert not report.warnings
        steps = [site for site in report.sites if site.q_len == "1"]
        assert {site.policy for site in steps if site.replaced} == {policy.name}
        assert all(site.replaced for site in steps)
        found.append(out)
    return found


def wanted(seed: int = 0) -> list[torch.Tensor]:
    """On one process. The first three are the dense model's tokens, those of fewer pages are others."""
    found = all_tokens(lambda: tiny("llama"), prompt(seed=seed))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    return found


def same(found: Any, want: list[torch.Tensor]) -> None:
    assert not isinstance(found, str), found
    assert [torch.equal(a, b) for a, b in zip(found, want, strict=True)] == [True] * len(want)


def heads_spread(folder: Path, device: str = "cpu") -> list[torch.Tensor]:
    """transformers' tensor parallelism over all processes."""
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    assert head_group(model) == dist.group.WORLD.group_name
    found = all_tokens(lambda: model, prompt(device))
    assert {site.heads for site in tokens(model, tsa.Exact(), prompt(device))[1].sites} == {"2/1"}
    return found


def weights_spread(device: str = "cpu") -> list[torch.Tensor]:
    """FSDP2: each rank has half of the weights, and a prompt of its own."""
    from torch.distributed.fsdp import fully_shard

    model = tiny("llama").to(device)
    for part in (*model.model.layers, model):
        fully_shard(part)
    return all_tokens(lambda: model, prompt(device, seed=dist.get_rank()))


def layers_spread(places: dict[str, Any], device: str = "cpu") -> list[torch.Tensor]:
    """accelerate's hooks between layers."""
    accelerate = pytest.importorskip("accelerate")
    return all_tokens(lambda: accelerate.dispatch_model(tiny("llama"), places, force_hooks=True), prompt(device))


def device_map(first: Any, second: Any) -> dict[str, Any]:
    names = ("model.embed_tokens", "model.rotary_emb", "model.layers.0")
    return {**dict.fromkeys(names, first), **dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), second)}


@pytest.mark.slow
def test_heads(tmp_path):
    want = wanted()
    tiny("llama").save_pretrained(tmp_path)
    for found in run_ranks(2, heads_spread, tmp_path, limit=400):
        same(found, want)


@pytest.mark.slow
def test_weights():
    for rank, found in enumerate(run_ranks(2, weights_spread, limit=400)):
        same(found, wanted(seed=rank))


@pytest.mark.slow
def test_layers():
    same(layers_spread(device_map("cpu", "cpu")), wanted())


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.gpu
@TWO_GPUS
def test_layers_on_two_gpus():
    same(layers_spread(device_map(0, 1), "cuda:0"), wanted())


@pytest.mark.gpu
@TWO_GPUS
@pytest.mark.parametrize("how", ["heads", "weights"])
def test_two_gpus(how, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    torch.save([wanted(seed) for seed in range(2)], tmp_path / "wanted.pt")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, how, tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, launcher)], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("alike") == 2


def main(how: str, folder: Path) -> None:
    """One rank of a torchrun job, each of which has a GPU."""
    from tsa_compile.tools.bench.tune_distributed import start

    device = str(start())
    found = heads_spread(folder, device) if how == "heads" else weights_spread(device)
    same(found, torch.load(folder / "wanted.pt")[dist.get_rank() if how == "weights" else 0])
    print("alike", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
