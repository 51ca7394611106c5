"""`dualroute serve` under load: tokens a second and waiting times by the number of clients.

    python benchmarks/serving.py --clients 1 4 16 64

A model of random weights (or --checkpoint) is served in a process of its own; each client asks again as soon
as its text is done, streaming, with prompts of its own.  Figures are of whole texts; first and next token as
the client sees them.  `--steps` times the model's own steps instead, without HTTP.  `--soak N` then sends N
short requests and tells how the server's memory went.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from data_prep.prepare import PrepareConfig, prepare
from dualroute.data.tokenizer import Tokenizer
from dualroute.evaluate.load import load
from dualroute.model import DualRoutingTransformer, ModelConfig
from dualroute.model.checkpoint.format import save_model
from dualroute.model.decoding.batched import new_text, next_logits


def make_model(folder: Path, shape: dict[str, Any]) -> Path:
    """A checkpoint of random weights, its tokenizer trained on made-up words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(2, 8))) for _ in range(4000)]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(20):
        (corpus / f"{number}.txt").write_text(" ".join(draw.choices(words, k=4000)) + "\n", encoding="utf-8")
    shards = folder / "shards"
    prepare(PrepareConfig(corpus=str(corpus), output=str(shards), vocab_size=4096, progress=False))
    tokenizer = Tokenizer(shards / "tokenizer.model")
    torch.manual_seed(0)
    model = DualRoutingTransformer(ModelConfig(vocab_size=tokenizer.vocab_size, **shape))
    save_model(model, folder / "model", tokenizer.path, {"step": 1, "context": shape["max_context"]})
    return folder / "model"


async def text(http: httpx.AsyncClient, body: dict[str, Any], times: dict[str, list[float]]) -> int:
    """Ask for one text; its tokens."""
    began, last, tokens = time.perf_counter(), 0.0, 0
    async with http.stream("POST", "/v1/completions", json=body) as stream:
        async for line in stream.aiter_lines():
            if not line.startswith("data: {"):
                continue
            part = json.loads(line[6:])
            tokens = part["usage"]["completion_tokens"] if part.get("usage") else tokens
            now = time.perf_counter()
            if part["choices"]:
                times["next" if last else "first"].append(now - (last or began))
                last = now
    return tokens


async def under_load(
    address: str, clients: int, seconds: float, prompt: int, new: int, vocab: int
) -> dict[str, Any]:
    """What `clients` get in that time."""
    times: dict[str, list[float]] = {"first": [], "next": []}
    tokens, end = 0, time.perf_counter() + seconds
    began = time.perf_counter()
    async with httpx.AsyncClient(
        base_url=address, timeout=600, limits=httpx.Limits(max_connections=None)
    ) as http:

        async def client(number: int) -> None:
            nonlocal tokens
            draw = random.Random(number)
            while time.perf_counter() < end:
                ids = [draw.randrange(10, vocab) for _ in range(prompt)]
                body = {
                    "model": "model",
                    "prompt": ids,
                    "max_tokens": new,
                    "stream": True,
                    "ignore_eos": True,
                }
                got = await text(http, body | {"stream_options": {"include_usage": True}}, times)
                tokens += got

        await asyncio.gather(*(client(number) for number in range(clients)))
    return {"tokens_s": tokens / (time.perf_counter() - began), **times}


def row(clients: int, found: dict[str, Any], alone: float) -> str:
    def cells(values: list[float]) -> str:
        cuts = statistics.quantiles(values, n=100) if len(values) > 1 else values * 99
        return " / ".join(f"{1000 * cuts[place]:,.0f}" for place in (49, 94, 98))

    rate = found["tokens_s"]
    return (
        f"| {clients} | {rate:,.0f} | {rate / alone:.1f} | {cells(found['first'])} | {cells(found['next'])} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--soak", type=int, default=0)
    parser.add_argument("--steps", action="store_true", help="only time steps of the model, without HTTP")
    args = parser.parse_args()
    shape = {
        "dim": args.dim,
        "num_layers": args.layers,
        "num_heads": max(args.dim // 64, 2),
        "max_context": args.context,
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or make_model(Path(folder), shape)
        words = [
            sys.executable,
            "-m",
            "dualroute",
            "serve",
            str(checkpoint),
            "--port",
            "0",
            "--name",
            "model",
        ]
        if args.steps:
            return steps(checkpoint, args.clients, args.prompt)
        said = Path(folder) / "server.log"  # a pipe that nobody reads would stop it
        server = subprocess.Popen(words, stdout=said.open("wb"))
        try:
            while (found := re.search(r"page: (http://[^/)]+)", said.read_text())) is None:
                if server.poll() is not None:
                    raise SystemExit(f"the server has ended: {said.read_text()[-2000:]}")
                time.sleep(0.1)
            address = found[1]
            vocab = Tokenizer(checkpoint / "tokenizer.model").vocab_size
            asyncio.run(under_load(address, 2, 2, args.prompt, 8, vocab))  # warm
            print("| clients | tokens/s | times one | first token ms, p50 / p95 / p99 | next token ms |")
            print("|---|---|---|---|---|")
            alone = 0.0
            for clients in args.clients:
                got = asyncio.run(under_load(address, clients, args.seconds, args.prompt, args.new, vocab))
                alone = alone or got["tokens_s"]
                print(row(clients, got, alone), flush=True)
            process = psutil.Process(server.pid)
            print(f"memory of the server: {process.memory_info().rss / 2**20:,.0f} MiB")
            if args.soak:
                soak(address, process, args.soak)
        finally:
            server.terminate()
            server.wait(60)


def steps(checkpoint: Path, texts: list[int], before: int) -> None:
    """CPU time of a step that writes a token of each text, `before` tokens behind its beginning."""
    model = load(checkpoint, "cpu", "float32").model.eval()
    torch.set_num_threads(1)
    print("| texts in a step | ms of CPU | times the tokens of one |\n|---|---|---|")
    alone = 0.0
    for count in texts:
        caches = [new_text(model, before + 100) for _ in range(count)]
        with torch.no_grad():
            for cache in caches:
                model.hidden_states(torch.randint(10, 300, (1, before)), caches=cache)
        spent = []
        for _ in range(20):
            began = time.process_time()
            next_logits(model, [5] * count, caches)
            spent.append(time.process_time() - began)
        median = statistics.median(spent)
        alone = alone or median
        print(f"| {count} | {1000 * median:.1f} | {count * alone / median:.1f} |")


def soak(address: str, process: psutil.Process, requests: int) -> None:
    """Short requests one after the other, eight at a time, and the memory at each tenth."""

    async def some(count: int) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=600) as http:
            left = iter(range(count))

            async def client() -> None:
                for number in left:
                    body = {"model": "model", "prompt": f"a text {number}", "max_tokens": 2}
                    (await http.post("/v1/completions", json=body)).raise_for_status()

            await asyncio.gather(*(client() for _ in range(8)))

    for part in range(10):
        asyncio.run(some(requests // 10))
        print(
            f"{(part + 1) * requests // 10:,} requests: {process.memory_info().rss / 2**20:,.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
