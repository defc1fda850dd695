"""The server and the client of examples/serve: clients at once, one of which hangs up. A minute."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from tests.vllm.engines import save_model

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples/serve"
OPTIONS = '{"tsa": {"policy": "BlockSparse", "alpha": 0.0, "last_dense": 0, "min_context": 200}}'


def client():
    spec = importlib.util.spec_from_file_location("serve_client", EXAMPLES / "client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_bytes_model(folder: Path) -> str:
    """The small model, with a tokenizer that reads bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return save_model(folder, vocab_size=len(alphabet), bos_token_id=None, eos_token_id=None)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(url, file of the log) of examples/serve/serve.sh."""
    folder = tmp_path_factory.mktemp("server")
    model = save_bytes_model(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", folder / "log"
    environment = {**os.environ, "TSA": OPTIONS, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    sizes = [
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "2048",
        "--max-num-batched-tokens",
        "256",
        "--block-size",
        "32",
    ]
    command = [str(EXAMPLES / "serve.sh"), model, "--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", "8", *sizes]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_for(url, process, log)
        yield url, log
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(500):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{url}/health") as answer:
                assert answer.status == 200
                return
        except OSError:
            time.sleep(1)
    pytest.fail(log.read_text()[-3000:])


def text(i: int) -> str:
    g = torch.Generator().manual_seed(i)
    return "".join(chr(97 + int(x)) for x in torch.randint(0, 26, (250 + 97 * i,), generator=g))


def test_eight_clients_of_which_one_hangs_up(server):
    url, log = server
    stream = client().stream

    def ask(i: int) -> str:
        pieces = stream(url, text(i), 200 if i == 3 else 16)
        if i == 3:
            first = next(pieces)
            pieces.close()
            return first
        return "".join(pieces)

    alone = [ask(i) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
    assert together == alone
    said = log.read_text()
    assert "prefill of 3 of 3 layers is sparse, in rows of 200 tokens or more" in said
    assert "1 sparse of 1 rows in 1 steps" in said
