"""`tsa-compile lookahead`: trains what `Resident` predicts pages by, and measures it on texts that it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tsa_compile.tools.option_values import numbers


def lookahead(
    model: Annotated[str, typer.Argument(help="a Hugging Face folder or id, or a packaged model: smollm2")],
    prompts: Annotated[list[str], typer.Option(help="a .jsonl file (a text a line) or a text file; several times")],
    out: Annotated[Path, typer.Option(help="the plan, a JSON file; its weights lie beside it")],
    keep: Annotated[float, typer.Option(help="share of the pages that are resident, in (0, 1]")] = 0.13,
    interval: Annotated[int, typer.Option(help="steps from one choice to the next", min=1)] = 64,
    layers: Annotated[str | None, typer.Option(help="layers that choose, comma separated; default: three of them")] = None,
    cut: Annotated[str | None, typer.Option(help="pieces of so many tokens, in turn, of all texts joined: 8192,31000")] = None,
    texts: Annotated[int | None, typer.Option(help="texts, or pieces, at most", min=2)] = None,
    epochs: Annotated[int, typer.Option(help="times that each text is read", min=1)] = 3,
    reuse: Annotated[int, typer.Option(help="updates for each reading", min=1)] = 1,
    rows: Annotated[int, typer.Option(help="queries of a text that an update is made on", min=1)] = 64,
    lr: Annotated[float, typer.Option(help="learning rate")] = 1e-4,
    held_out: Annotated[int, typer.Option(help="last texts, which are measured", min=1)] = 2,
    state: Annotated[Path | None, typer.Option(help="file of the training; a second call goes on from it")] = None,
) -> None:
    """Train an index for `Resident`'s set of pages on your own texts, and say how much of the attention its sets hold."""
    import torch

    from tsa_compile.learn.lookahead_settings import LookaheadTraining
    from tsa_compile.learn.prompt_file import read_prompts
    from tsa_compile.plan import Plan
    from tsa_compile.policies.resident import Resident
    from tsa_compile.tools.indexer_job import pieces
    from tsa_compile.tools.load_models import load_causal_lm, load_tokenizer
    from tsa_compile.tools.lookahead_job import run

    chosen = None if layers is None else tuple(numbers("--layers", layers, int))
    policy = Resident(keep=keep, interval=interval, layers=chosen)
    training = LookaheadTraining(epochs=epochs, reuse=reuse, rows=rows, lr=lr)
    if not out.absolute().parent.is_dir():  # before minutes of training
        raise ValueError(f"--out: the folder of {out} does not exist")
    given = list(read_prompts(prompts, lambda: load_tokenizer(model), None))
    if cut is not None:
        given = pieces(given, numbers("--cut", cut, int))
    network = load_causal_lm(model, torch.bfloat16 if torch.cuda.is_available() else None)
    console = Console(soft_wrap=True)
    run(network, given[:texts], Plan(decode=policy), out, training, held_out, state, console)
    console.print(f"{out}, {out.with_suffix('.safetensors')}: the plan and its weights", markup=False)
