"""`tsa-compile bench`: attention, decode, steps, acceptance, prefill, export; the other commands have files of their own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tsa_compile.tools.bench.diffusion_cli import bench_diffusion
from tsa_compile.tools.bench.distributed_cli import bench_context_parallel
from tsa_compile.tools.bench.host_cli import bench_host
from tsa_compile.tools.bench.lossless_cli import bench_lossless
from tsa_compile.tools.bench.resident_cli import bench_resident
from tsa_compile.tools.bench.rollout_cli import bench_rollout
from tsa_compile.tools.bench.round_cli import bench_round
from tsa_compile.tools.option_values import numbers

bench = typer.Typer(help="Time attention or a whole prefill on the GPU, dense against sparse.", no_args_is_help=True)
console = Console(width=None if sys.stdout.isatty() else 160)  # a table in a file has room
Repeats = Annotated[int, typer.Option(help="timed runs; the median counts", min=1)]
JsonFile = Annotated[str | None, typer.Option("--json", help="write the results to this file")]


bench.command("diffusion")(bench_diffusion)
bench.command("rollout")(bench_rollout)
bench.command("host")(bench_host)
bench.command("round")(bench_round)
bench.command("lossless")(bench_lossless)
bench.command("context-parallel")(bench_context_parallel)
bench.command("resident")(bench_resident)


@bench.command("attention")
def bench_attention(
    only: Annotated[str | None, typer.Option(help="cases whose name contains this; several, in order: 'L128K,keep 0.5'")] = None,
    seconds: Annotated[float | None, typer.Option(help="begin no case after this time")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="NAME=PATH of a file with a function attention(q, k, v)")] = None,
    json: JsonFile = None,
    html: Annotated[str | None, typer.Option(help="write speed-up against length to this file")] = None,
) -> None:
    """Each stage of token-sparse attention and the dense kernels, in one run; each result is checked before it is timed."""
    import time

    from tsa_compile.progress import track
    from tsa_compile.tools.bench import attention_bench, cases, output, timing

    found = cases.select_cases(only)
    pairs = [p.partition("=") for p in peer or []]
    peers = {name: attention_bench.load_peer(path) for name, _, path in pairs}
    gpu, versions = timing.gpu_and_versions()
    start, rows = time.monotonic(), list[attention_bench.AttentionRow]()
    for case in track(found, "timing", len(found), console):
        if seconds is not None and time.monotonic() - start > seconds:
            console.print(f"not begun after {seconds} s: {', '.join(c.name for c in found[len(rows) :])}", markup=False)
            break
        rows.append(attention_bench.bench_case(case, peers))
        if json:  # after each, so that a cut run leaves what it has
            output.write_json(json, rows, environment=versions, ceilings=gpu)
    console.print(output.attention_table(rows, gpu))
    if html:
        notes = [", ".join(f"{k} {v}" for k, v in versions.items())]
        output.write_html(html, "Speed-up over SDPA against length", output.attention_plot(rows), notes)


@bench.command("decode")
def bench_decode_step(
    only: Annotated[str | None, typer.Option(help="cases whose name contains this; several: 'B1 L32K,B8'")] = None,
    sweep: Annotated[
        str, typer.Option(help="also time other tiles, stages, warps of: 'exact,attend,select,score,refine,complete,sampled'")
    ] = "",
    repeats: Repeats = 15,
    json: JsonFile = None,
) -> None:
    """Decode attention, every key or selected pages, beside SDPA; each result is checked in float64 before it is timed."""
    from tsa_compile.tools.bench import decode, decode_cases, output, timing

    swept = [part.strip() for part in sweep.split(",") if part]
    if unknown := set(swept) - set(decode.SWEEPS):
        raise typer.BadParameter(f"--sweep has no {', '.join(sorted(unknown))}; it takes {', '.join(decode.SWEEPS)}")
    gpu, versions = timing.gpu_and_versions()
    rows = list[decode.DecodeRow]()
    for case in decode_cases.CASES:
        if only is not None and not any(part.strip() in case.name for part in only.split(",")):
            continue
        rows.append(decode.bench_decode(case, gpu["copy_tbps"], swept, repeats))
        console.print("\n".join(decode.told(rows[-1])), markup=False, highlight=False)
        if json:
            output.write_json(json, rows, environment=versions, ceilings=gpu)


@bench.command("steps")
def bench_whole_steps(
    cases: Annotated[str, typer.Option(help="batch x length, comma separated")] = "1x131072,4x32768,8x16384,1x1024",
    keep: Annotated[str, typer.Option(help="shares of the pages, comma separated; 'all': every key")] = "all,0.05",
    layers: Annotated[int, typer.Option(help="layers of the random Llama-3.1-8B", min=1)] = 32,
    compiler: Annotated[str, typer.Option(help="inductor or eager; both: 'eager,inductor'")] = "eager",
    json: JsonFile = None,
) -> None:
    """Decode steps of a random-weight Llama-3.1-8B over a filled cache: replay, call and `generate()` beside the bytes' time."""
    from tsa_compile.tools.bench import output, prefill, steps, timing

    gpu, versions = timing.gpu_and_versions()
    model, rows = prefill.build_llama(layers), list[steps.StepRow]()
    for kind in compiler.split(","):
        for share in keep.split(","):
            for batch, length in _sizes(cases):
                case = steps.StepCase(batch, length, None if share == "all" else float(share))
                rows.append(steps.bench_steps(model, case, gpu["copy_tbps"], kind))
                console.print(steps.told(rows[-1]), markup=False, highlight=False)
                if json:
                    output.write_json(json, rows, environment=versions, ceilings=gpu, layers=layers)


@bench.command("acceptance")
def bench_acceptance(
    model: Annotated[str, typer.Argument(help="smollm2, gemma3-270m, a folder or a Hugging Face id")] = "smollm2",
    drafts: Annotated[str, typer.Option(help="comma separated")] = "verify,pages,window,lookup",
    lengths: Annotated[str, typer.Option(help="tokens before the first new one, comma separated")] = "2000,3900",
    new: Annotated[int, typer.Option(help="tokens to generate", min=1)] = 128,
    gamma: Annotated[int, typer.Option(help="tokens of a draft", min=1, max=15)] = 6,
    share: Annotated[float, typer.Option(help="of the keys, that drafts read; at least 256 keys")] = 0.07,
    sampled: Annotated[bool, typer.Option(help="temperature 0.6, top-p 0.95")] = True,
    json: JsonFile = None,
) -> None:
    """Tokens a verify and acceptance by place of speculative generation behind prose and code, draft by draft; on any device."""
    import torch
    import transformers

    from tsa_compile.tools.bench import acceptance, output
    from tsa_compile.tools.load_models import load_causal_lm, load_tokenizer

    rows = list[acceptance.Acceptance]()
    loaded = load_causal_lm(model), load_tokenizer(model)
    for row in acceptance.measure(*loaded, drafts.split(","), numbers("--lengths", lengths, int), new, gamma, share, sampled):
        rows.append(row)
        console.print(row, markup=False, highlight=False)
        if json:
            versions = dict(torch=torch.__version__, transformers=transformers.__version__)
            output.write_json(json, rows, environment=versions, model=model, dtype=str(loaded[0].dtype))


@bench.command("prefill")
def bench_prefill(
    lengths: Annotated[str, typer.Option(help="prompt lengths, comma separated")] = "8192,32768,131072",
    layers: Annotated[int, typer.Option(help="layers of the random Llama-3.1-8B", min=1)] = 32,
    coverage: Annotated[
        float | None,
        typer.Option(help="of TokenSparse: random attention is flat, so it drops about as large a share", min=0),
    ] = None,
    keep: Annotated[float | None, typer.Option(help="BlockSparse, forced to this share of the pairs", min=0, max=1)] = None,
    repeats: Repeats = 3,
    compiler: Annotated[str, typer.Option(help="of both models: inductor or eager")] = "inductor",
    json: JsonFile = None,
) -> None:
    """Time to the first token of a random-weight Llama-3.1-8B, dense and transformed (by the default plan) in turns."""
    from tsa_compile.plan import as_plan
    from tsa_compile.policies.token_sparse import TokenSparse
    from tsa_compile.tools.bench import output, prefill, timing

    if coverage is not None and keep is not None:
        raise ValueError("--coverage is of TokenSparse and --keep of BlockSparse: give one")
    policy = None if coverage is None else TokenSparse(coverage=coverage)
    gpu, versions = timing.gpu_and_versions()
    head = dict(environment=versions, ceilings=gpu, layers=layers, compiler=compiler, keep=keep, policy=as_plan(policy).to_dict())
    rows, model = list[prefill.PrefillRow](), prefill.build_llama(layers)
    for row in prefill.bench_prefill(model, numbers("--lengths", lengths, int), policy, repeats, compiler, keep):
        rows.append(row)
        console.print(row, markup=False, highlight=False)
        if json:
            output.write_json(json, rows, **head)
    console.print(output.prefill_table(rows))


@bench.command("export")
def bench_export(
    json: Annotated[Path, typer.Option(help="write the results to this file")],
    lengths: Annotated[str, typer.Option(help="prompt lengths of the attention, comma separated, or none")] = "8192,32768,131072",
    model: Annotated[
        list[str] | None,
        typer.Option(help="smollm2, a folder, a Hugging Face id or none; else four layers of SmolLM2's and Llama-8B's shape"),
    ] = None,
) -> None:
    """Exported files on ONNX Runtime's CUDA provider against PyTorch: results, where nodes ran, times."""
    from tsa_compile.tools.bench import exported, exported_files, timing

    timing.check_gpu()
    models = list(exported_files.MODELS) if model is None else [m for m in model if m]
    if not (lengths or models):
        raise ValueError("nothing to export: neither lengths nor a model")
    result = exported.bench_export(json, numbers("--lengths", lengths, int), models)
    if result["failed"]:
        raise RuntimeError(f"failed: {result['failed']}")


def _sizes(cases: str) -> list[tuple[int, int]]:
    """(batch, length) of each of "batch x length, comma separated"."""
    pairs = [size.partition("x") for size in cases.split(",")]
    return [(int(batch), int(length)) for batch, _, length in pairs]
