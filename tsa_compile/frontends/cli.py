"""The command line: `tsa-compile demo|explain|compare|warm|reach|calibrate|gate|indexer|lookahead|distill|eval|export`,
`zoo`, `bench`, `tune` and `diffusion`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tsa_compile.tools.bench.bench_cli import Repeats, bench
from tsa_compile.tools.bench.tune_cli import tune
from tsa_compile.tools.diffusion.diffusion_cli import diffusion
from tsa_compile.tools.distill_cli import distill
from tsa_compile.tools.eval_cli import evaluate
from tsa_compile.tools.gate_cli import gate
from tsa_compile.tools.indexer_cli import indexer
from tsa_compile.tools.lookahead_cli import lookahead
from tsa_compile.tools.option_values import numbers
from tsa_compile.tools.reach_cli import reach
from tsa_compile.tools.warm_cli import warm
from tsa_compile.tools.zoo_cli import zoo

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
app.add_typer(bench, name="bench")
console = Console()

_EXTRAS = {  # module -> the extra that brings it
    **dict.fromkeys(("transformers", "accelerate", "safetensors"), "hf"),
    **dict.fromkeys(("onnx", "onnx_ir", "onnxscript", "onnxruntime"), "onnx"),
    **dict.fromkeys(("wonderwords", "scipy"), "ruler"),
    **{"gguf": "demo", "triton": "triton", "flash_attn": "fa4", "tensorrt_rtx": "tensorrt"},
}
Tokens = Annotated[int, typer.Option(help="prompt length, in tokens", min=64)]
PlanFile = Annotated[Path | None, typer.Option(help="a JSON file of a plan or a policy, in place of --coverage")]
Coverage = Annotated[float | None, typer.Option(help="share of attention mass that may be dropped, in [0, 1)")]


@app.command()
def demo(tokens: Tokens = 4000, coverage: Coverage = None, repeats: Repeats = 1) -> None:
    """Load SmolLM2-135M-Instruct, hide a number in a long text, and ask for it dense and token-sparse."""
    from tsa_compile.plan import default_policy
    from tsa_compile.tools import demo as job

    result = job.run_demo(tokens, default_policy(coverage), console, repeats)
    job.print_result(result, console)
    if not result.both_found:
        raise typer.Exit(1)


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="a Hugging Face folder or id, or a packaged model: smollm2")],
    tokens: Tokens = 4000,
    coverage: Coverage = None,
    plan: PlanFile = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say which attention sites of MODEL would be replaced in a prefill of random tokens, and why the others not."""
    import torch

    from tsa_compile import api
    from tsa_compile.plan import Plan, default_policy
    from tsa_compile.tools.load_models import load_causal_lm

    policy = Plan.load(plan) if plan else default_policy(coverage)
    network = load_causal_lm(model)
    ids = torch.randint(0, network.config.get_text_config().vocab_size, (1, tokens), device=network.device)
    report = api.explain(network, input_ids=ids, use_cache=False, policy=policy)
    if json:
        print(report.to_json())
        return
    console.print(report.to_table())
    for warning in report.warnings:
        console.print(f"warning: {warning}", markup=False)


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="a Hugging Face folder or id, or a packaged model: smollm2")],
    tokens: Tokens = 4000,
    text: Annotated[str | None, typer.Option(help="a text file to read; without it the prompt is generated prose")] = None,
    coverage: Coverage = None,
    plan: PlanFile = None,
    repeats: Repeats = 3,
) -> None:
    """Run MODEL on a text, dense and token-sparse: which sites are replaced, how much faster, how close to dense."""
    from tsa_compile import check
    from tsa_compile.learn.prompt_file import read_text
    from tsa_compile.plan import Plan, default_policy
    from tsa_compile.tools.bench.prompts import essay
    from tsa_compile.tools.load_models import load_causal_lm, load_tokenizer

    policy = Plan.load(plan) if plan else default_policy(coverage)
    prompt = read_text(text) if text else essay(tokens, seed=0)
    ids = load_tokenizer(model)(prompt, return_tensors="pt").input_ids[:, :tokens]
    network = load_causal_lm(model)
    with console.status(f"running {ids.shape[1]} tokens, dense and sparse"):
        result = check.compare(network, input_ids=ids.to(network.device), use_cache=False, policy=policy, repeats=repeats)
    console.print(result.to_table())
    console.print(result.summary(), markup=False, highlight=False)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="a Hugging Face folder or id, or a packaged model: smollm2")],
    prompts: Annotated[list[str], typer.Option(help="a .jsonl file (a prompt a line) or a text file (one prompt)")],
    out: Annotated[str, typer.Option(help="the plan, a JSON file")],
    target: Annotated[
        str, typer.Option(help="kl<=X; sparsity>=X (TokenSparse), pairs<=X (BlockSparse), pages<=X (PageSparse)")
    ] = "kl<=0.01",
    policy: Annotated[str | None, typer.Option(help="JSON file of a sparse layer's policy")] = None,
    coverages: Annotated[str | None, typer.Option(help="TokenSparse: what a layer may get, comma separated")] = None,
    alphas: Annotated[str | None, typer.Option(help="BlockSparse: what a head may get, comma separated")] = None,
    keeps: Annotated[str | None, typer.Option(help="PageSparse: what a KV head may get, comma separated")] = None,
    method: Annotated[str, typer.Option(help="loss; or with fewer runs: drift (TokenSparse), error, one (others)")] = "loss",
    last: Annotated[int, typer.Option(help="predictions that are compared, of a prompt", min=1)] = 128,
    max_tokens: Annotated[int | None, typer.Option(help="longer prompts lose their beginning", min=1)] = None,
    state: Annotated[str | None, typer.Option(help="file of what is measured; a second call goes on from it")] = None,
) -> None:
    """Choose a policy for each layer of MODEL on your own prompts, and write the plan."""
    from tsa_compile.learn.calibrate_cli import calibrate_files

    given = (("--coverages", coverages), ("--alphas", alphas), ("--keeps", keeps))
    coverage, alpha, keep = (numbers(n, x, float) if x else None for n, x in given)
    if not Path(out).absolute().parent.is_dir() or Path(out).is_dir():  # before hours of measurements
        raise ValueError(f"--out: {out} cannot be written: its folder does not exist, or it is one")
    plan = calibrate_files(model, prompts, target, policy, coverage, alpha, keep, method, last, max_tokens, state)
    plan.save(out)
    console.print(f"{out}: {plan.notes['sparse layers']} layers sparse; {plan.notes['measured']}", markup=False)


@app.command("export")
def export_command(
    model: Annotated[str, typer.Argument(help="a Hugging Face folder or id, smollm2, or an exported .onnx file")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the file to write: .onnx, .engine or .pt2")],
    to: Annotated[str, typer.Option(help="onnx (ONNX Runtime), tensorrt, or aoti (AOTInductor)")] = "onnx",
    graph: Annotated[str, typer.Option(help="prefill (token-sparse), or decode: one token and a cache, dense")] = "prefill",
    form: Annotated[str, typer.Option(help="portable: standard operators only; custom: needs libtsa_ort.so")] = "portable",
    native: Annotated[bool, typer.Option("--native", help="build libtsa_ort.so for the model, beside --out")] = False,
    cuda: Annotated[bool, typer.Option("--cuda", help="with --native: with CUDA kernels (needs Triton, no GPU)")] = False,
    capability: Annotated[list[str] | None, typer.Option(help="GPUs to compile for, such as 9.0; several times")] = None,
    runtime: Annotated[str, typer.Option(help="with --to tensorrt: tensorrt_rtx or tensorrt")] = "tensorrt_rtx",
    coverage: Coverage = None,
    plan: PlanFile = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    tokens: Annotated[int, typer.Option(help="length of the example input, in tokens", min=2)] = 512,
    max_tokens: Annotated[int, typer.Option(help="longest prompt of a TensorRT engine, in tokens", min=2)] = 8192,
    max_batch: Annotated[int, typer.Option(help="largest batch of a TensorRT engine", min=1)] = 4,
    check: Annotated[bool, typer.Option(help="run an ONNX file on the CPU and compare it with PyTorch")] = True,
) -> None:
    """Write MODEL as an artifact that runs without this project: see docs/export.md."""
    import torch

    from tsa_compile.export import export_cli
    from tsa_compile.plan import Plan, as_plan
    from tsa_compile.policies.token_sparse import TokenSparse
    from tsa_compile.tools.load_models import load_causal_lm

    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"--dtype must be float32, float16 or bfloat16, got {dtype!r}")
    own = TokenSparse() if coverage is None else TokenSparse(coverage=coverage)  # what can be exported
    chosen = Plan.load(plan) if plan else as_plan(own)
    request = export_cli.Request(
        to, out, chosen, graph, form, tokens, max_tokens, max_batch, native, cuda, check, runtime, tuple(capability or ())
    )
    if model.endswith(".onnx"):
        files = export_cli.export_file(Path(model), request, console)
    else:
        files = export_cli.export_model(load_causal_lm(model).to(getattr(torch, dtype)), request, console)
    for file in files:
        console.print(f"wrote {file}", markup=False, soft_wrap=True)


app.command("eval")(evaluate)
app.command()(tune)
app.command()(reach)
app.command()(gate)
app.command()(indexer)
app.command()(lookahead)
app.command()(distill)
app.command()(warm)
app.command()(diffusion)
app.command()(zoo)


def main() -> None:
    """Entry point of `tsa-compile`; expected failures are one line on stderr and exit code 1."""
    try:
        app(standalone_mode=True)
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        Console(stderr=True).print(f"error: {error}{_what_to_install(error)}", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error


def _what_to_install(error: Exception) -> str:
    """For a module that an extra of ours brings and that is missing: which."""
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ImportError) or missing not in _EXTRAS:
        return ""
    extra = "demo" if sys.argv[1:2] == ["demo"] else _EXTRAS[missing]
    return f': pip install "tsa-compile[{extra}]"'
