"""`tsa-compile distill`: an adapter with which a model's sparse decode is nearer to the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tsa_compile.tools.option_values import numbers


def distill(
    model: Annotated[str, typer.Argument(help="a Hugging Face folder or id, or a packaged model: smollm2")],
    plan: Annotated[Path, typer.Option(help="how the model decodes: a plan, as `indexer --out` writes it")],
    prompts: Annotated[list[str], typer.Option(help="a .jsonl file (a text a line) or a text file; several times")],
    out: Annotated[Path, typer.Option(help="the plan again, a JSON file; the adapter's folder lies beside it")],
    cut: Annotated[str | None, typer.Option(help="pieces of so many tokens, in turn, of all texts joined: 8192,31000")] = None,
    texts: Annotated[int | None, typer.Option(help="texts, or pieces, at most", min=2)] = None,
    held_out: Annotated[int, typer.Option(help="last texts, which are measured", min=0)] = 4,
    steps: Annotated[int, typer.Option(help="last tokens of a text that are decode steps", min=1)] = 256,
    rank: Annotated[int, typer.Option(help="of the LoRA weights", min=1)] = 16,
    likeliest: Annotated[int, typer.Option(help="tokens of the teacher that are told apart", min=1)] = 10,
    epochs: Annotated[int, typer.Option(help="times that each text is read", min=1)] = 1,
    lr: Annotated[float, typer.Option(help="learning rate")] = 1e-4,
    state: Annotated[Path | None, typer.Option(help="file of the training; a second call goes on from it")] = None,
) -> None:
    """Self-distillation, the stage after `indexer`: LoRA weights that bring MODEL's steps under a plan to its dense ones."""
    import torch

    from tsa_compile.learn.distillation import Distillation
    from tsa_compile.learn.prompt_file import read_prompts
    from tsa_compile.learn.self_distill import distill as train
    from tsa_compile.plan import Plan
    from tsa_compile.tools.indexer_job import pieces
    from tsa_compile.tools.load_models import load_causal_lm, load_tokenizer

    recipe = Distillation(rank=rank, likeliest=likeliest, steps=steps, epochs=epochs, lr=lr)
    if not out.absolute().parent.is_dir():  # before minutes of training
        raise ValueError(f"--out: the folder of {out} does not exist")
    given, known = list(read_prompts(prompts, lambda: load_tokenizer(model), None)), Plan.load(plan)
    if cut is not None:
        given = pieces(given, numbers("--cut", cut, int))
    network = load_causal_lm(model, torch.bfloat16 if torch.cuda.is_available() else None)
    made = train(network, given[:texts], known, out, recipe, held_out=held_out, state=state)
    console = Console(soft_wrap=True)
    for name, kl in made.notes["adapter"]["held out"].items():
        console.print(f"held-out texts, {name}: KL {kl:.5f}", markup=False, highlight=False)
    console.print(f"{out}, {out.with_suffix('.adapter')}: the plan and its adapter", markup=False)
