"""`tsa-compile bench export`: exported files on ONNX Runtime's CUDA provider, against the same policy in PyTorch.

Results are compared before anything is timed; all times are from one run.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tsa_compile.tools.bench.exported_files import DIM, DTYPES, HEADS, KV_HEADS, POLICIES, load_model, prepare
from tsa_compile.tools.bench.onnx_cuda import CudaSession, placement
from tsa_compile.tools.bench.timing import environment, in_turns, median_ms

Job = tuple[str, ...]
Made = tuple[Path, Path | None]  # the file and, for the custom form, its library
MODEL_SIZES = ((2, 1500), (1, 3001), (1, 8192))
PORTABLE_LENGTH = 8192  # the portable body stores a score for each pair of kept tokens


@dataclasses.dataclass(frozen=True)
class AttentionRow:
    """Milliseconds of one attention; `error`: relative L2 difference of `custom` from the PyTorch operator."""

    dtype: str
    policy: str
    length: int
    kept: float
    torch_ms: float
    custom_ms: float
    portable_ms: float | None
    dense_ms: float | None
    error: float
    portable_error: float | None


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """A model's file against the transformed PyTorch model.

    error: relative L2 difference of the logits; same_top: share of positions with the same most likely token.
    site_nodes: provider -> operator -> [count, largest output in bytes], of the nodes of all sites.
    copies: Memcpy nodes that ONNX Runtime ran between host and device.
    """

    model: str
    dtype: str
    form: str
    batch: int
    length: int
    error: float
    same_top: float
    torch_ms: float
    ort_ms: float
    site_nodes: dict[str, dict[str, list[int]]]
    copies: int


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def bench_attention(kinds: Mapping[str, Made], dtype: torch.dtype, length: int) -> list[AttentionRow]:
    """Both policies at one length, by the files of `prepare`."""
    q, k, v = (torch.randn(1, h, length, DIM, dtype=dtype, device="cuda") for h in (HEADS, KV_HEADS, KV_HEADS))
    out, repeats = torch.empty_like(q), 5 if length > 50_000 else 15

    def bound(kind: str) -> Callable[[], None]:
        run = CudaSession(*kinds[kind]).bind((q, k, v), out)
        out.fill_(float("nan"))
        run()
        return run

    def row(name: str, dense_ms: float | None) -> AttentionRow:
        p = POLICIES[name]
        c = p.completion
        strip = (c.window, c.sinks, c.heavy) if c else (0, 0, 0)
        selection = (DIM**-0.5, p.coverage, p.window, p.pool, p.min_tokens)
        work = lambda: torch.ops.tsa.token_sparse_attention(q, k, v, None, *selection, *strip, "fused")  # noqa: E731
        expected = work()
        kept = torch.ops.tsa.select_tokens(q, k, None, None, *selection, strip[2])[1].item() / length
        custom = bound(f"custom {name}")
        error = relative(out, expected)
        torch_ms, custom_ms = in_turns((work, custom), repeats)
        portable_ms = portable_error = None
        if f"portable {name}" in kinds and length <= PORTABLE_LENGTH:
            portable = bound(f"portable {name}")
            portable_error, portable_ms = relative(out, expected), median_ms(portable, repeats)
        return AttentionRow(str(dtype), name, length, kept, torch_ms, custom_ms, portable_ms, dense_ms, error, portable_error)

    dense_ms = median_ms(bound("dense"), repeats) if "dense" in kinds else None
    return [row(name, dense_ms) for name in POLICIES]


def bench_model(files: Mapping[str, Made], name: str, dtype: torch.dtype) -> list[ModelRow]:
    """Each form's file at (batch, length)s that it was not exported at."""
    from tsa_compile import api

    model = api.transform(load_model(name, dtype), POLICIES["completed"], fullgraph=True)
    inputs = [torch.randint(0, 1000, size, device="cuda") for size in MODEL_SIZES]
    with torch.no_grad():
        expected = [model(ids) for ids in inputs]
        torch_ms = [median_ms(functools.partial(model, ids), 5) for ids in inputs]
    rows: list[ModelRow] = []
    for form, made in files.items():
        session = CudaSession(*made, profile=str(made[0].parent / "profile"))
        outputs = [torch.full_like(x, float("nan")) for x in expected]
        for ids, out in zip(inputs, outputs, strict=True):
            session.bind((ids,), out)()
        torch.cuda.synchronize()
        where = placement(Path(session.session.end_profiling()))  # from here on nothing is recorded
        for size, ids, out, right, reference in zip(MODEL_SIZES, inputs, outputs, expected, torch_ms, strict=True):
            same = (out.argmax(-1) == right.argmax(-1)).float().mean().item()
            error, ms = relative(out, right), median_ms(session.bind((ids,), out), 5)
            rows.append(ModelRow(name, str(dtype), form, *size, error, same, reference, ms, *where))
    return rows


def attention_jobs(folder: str) -> list[Job]:
    """Exports of one attention: (folder, "attention", kind, dtype)."""
    kinds = [f"{form} {policy}" for form in ("custom", "portable") for policy in POLICIES]
    half = [(folder, "attention", kind, "float16") for kind in ("dense", *kinds)]
    return [*half, *((folder, "attention", f"custom {policy}", "bfloat16") for policy in POLICIES)]


def model_jobs(folder: str, models: Sequence[str]) -> list[Job]:
    """Exports of models: (folder, model, form, dtype)."""
    forms = [(folder, name, form) for name in models for form in ("portable", "custom")]
    return [(*form, dtype) for form in forms for dtype in DTYPES.get(form[1], ("float16", "bfloat16"))]


def prepare_all(jobs: Sequence[Job], failed: dict[str, str]) -> dict[Job, Made]:
    """Every export, in parallel; what fails is left out and told in `failed`."""
    made: dict[Job, Made] = {}
    with concurrent.futures.ProcessPoolExecutor(len(jobs), multiprocessing.get_context("spawn")) as pool:
        for job, future in [(job, pool.submit(prepare, job)) for job in jobs]:
            try:
                made[job] = future.result()
            except Exception as error:  # whatever a runtime raises is a result of this benchmark
                failed["export " + " ".join(job[1:])] = f"{type(error).__name__}: {error}"
    return made


def bench_export(out: Path, lengths: Sequence[int], models: Sequence[str]) -> dict[str, Any]:
    """Export everything, then check and time; `out`, a JSON file, is rewritten after each part. "failed" says what raised.

    lengths: of the attention. models: shapes of `exported_files.MODELS`, packaged names, folders or Hugging Face ids.
    """
    import onnxruntime as ort

    failed: dict[str, str] = {}
    versions = {**environment(), "onnxruntime": ort.__version__}
    result: dict[str, Any] = {"environment": versions, "attention": [], "models": [], "failed": failed}

    def add(part: str, label: str, work: Callable[[], Sequence[Any]]) -> None:
        try:
            for row in work():
                print(row, flush=True)
                result[part].append(dataclasses.asdict(row))
        except Exception as error:  # as above
            failed[label] = f"{type(error).__name__}: {error}"
            print(label, failed[label], flush=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        torch.cuda.empty_cache()

    with tempfile.TemporaryDirectory() as folder:
        made = prepare_all([*(attention_jobs(folder) if lengths else ()), *model_jobs(folder, models)], failed)
        groups: dict[tuple[str, str], dict[str, Made]] = {}
        for (_, what, kind, dtype), file in made.items():
            groups.setdefault((what, dtype), {})[kind] = file
        with torch.cuda.stream(torch.cuda.Stream()):  # the default stream is no stream that ONNX Runtime could be given
            for length in lengths:
                for (what, dtype), files in groups.items():
                    if what == "attention":
                        add(what, f"{dtype} {length}", functools.partial(bench_attention, files, getattr(torch, dtype), length))
            for (what, dtype), files in groups.items():
                if what != "attention":
                    add("models", f"{what} {dtype}", functools.partial(bench_model, files, what, getattr(torch, dtype)))
    return result
