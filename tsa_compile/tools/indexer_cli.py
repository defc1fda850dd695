"""`tsa-compile indexer`: which heads look things up, a trained index for them, and a plan that decodes by both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tsa_compile.tools.option_values import numbers


def indexer(
    model: Annotated[str, typer.Argument(help="a Hugging Face folder or id, or a packaged model: smollm2")],
    prompts: Annotated[list[str], typer.Option(help="a .jsonl file (a text a line) or a text file; several times")],
    out: Annotated[Path, typer.Option(help="the plan, a JSON file; its weights lie beside it")],
    cut: Annotated[str | None, typer.Option(help="pieces of so many tokens, in turn, of all texts joined: 8192,31000")] = None,
    texts: Annotated[int | None, typer.Option(help="texts, or pieces, at most", min=2)] = None,
    share: Annotated[float, typer.Option(help="of all query heads that look things up, in (0, 1]")] = 0.15,
    window: Annotated[int, typer.Option(help="last tokens that other heads read", min=1)] = 8192,
    prefill: Annotated[bool, typer.Option("--prefill", help="the plan reads prompts by roles, too")] = False,
    mass: Annotated[float, typer.Option(help="of the projected softmax that steps read, in (0, 1)")] = 0.9,
    width: Annotated[int | None, typer.Option(help="numbers of a projection; default: an eighth of the head dim", min=1)] = None,
    epochs: Annotated[int, typer.Option(help="times that each text is read", min=1)] = 1,
    reuse: Annotated[int, typer.Option(help="updates for each reading", min=1)] = 4,
    rows: Annotated[int, typer.Option(help="query rows of an update", min=1)] = 256,
    lr: Annotated[float, typer.Option(help="learning rate")] = 1e-3,
    held_out: Annotated[int, typer.Option(help="last texts, which are measured", min=1)] = 4,
    last: Annotated[int, typer.Option(help="tokens at the end of these that are decoded; 0: none", min=0)] = 16,
    state: Annotated[Path | None, typer.Option(help="file of the training; a second call goes on from it")] = None,
) -> None:
    """Train an index for the heads of MODEL that look things up, on your own texts, and say how near it comes to all keys."""
    import torch

    from tsa_compile.learn.indexer_settings import Training
    from tsa_compile.learn.prompt_file import read_prompts
    from tsa_compile.tools.indexer_job import Request, pieces, run
    from tsa_compile.tools.load_models import load_causal_lm, load_tokenizer

    training = Training(width=width, mass=mass, epochs=epochs, rows=rows, reuse=reuse, lr=lr)
    if not out.absolute().parent.is_dir():  # before minutes of training
        raise ValueError(f"--out: the folder of {out} does not exist")
    given = list(read_prompts(prompts, lambda: load_tokenizer(model), None))
    if cut is not None:
        given = pieces(given, numbers("--cut", cut, int))
    request = Request(out, share, window, prefill, training, held_out, last, state)
    network = load_causal_lm(model, torch.bfloat16 if torch.cuda.is_available() else None)
    console = Console(soft_wrap=True)
    run(network, given[:texts], request, console)
    console.print(f"{out}, {out.with_suffix('.safetensors')}: the plan and its weights", markup=False)
