"""Train one small language model twice, with torch's cross-entropy and with fastloss's, and compares.

Both runs start from the same weights, see the same batches and differ in one line: the loss. Each lives in a
process of its own, so that peak memory is its own, and the two take turns every few steps, so that a
machine that slows down or speeds up does so for both. The model is a GPT: pre-norm blocks, causal attention,
input and output embeddings tied. The text is the language reference and the docstrings that ship
with CPython, or a file of yours, byte-pair encoded on the spot.

Written to `--out`: `train_lm.png` (curves, times, memory) and `train_lm.json` (every step's numbers).
Exits with 1 when the loss curves differ by more than `lm_report.TOLERANCES`.

    python benchmarks/train_lm.py --text my_corpus.txt --steps 500
"""

from __future__ import annotations

import argparse
import ast
import importlib
import multiprocessing
import sys
import sysconfig
import time
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from lm_report import Run, Settings, Step, agree, draw, save, table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

LOSSES = {"torch": "torch.nn.functional", "fastloss": "fastloss.functional"}
STEPS = 120
TURN = 5  # steps that one run takes before it is the other's turn
PATIENCE = 180.0  # seconds of training, unless --steps is given, after which a slow or busy machine may stop
MIN_STEPS = 30  # steps before it may


# ---- text ----------------------------------------------------------------------------------------


def python_text() -> str:
    """Return English text that ships with CPython: the language reference and the library's docstrings."""
    from pydoc_data.topics import topics

    docs: dict[str, None] = {}  # an ordered set
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if {"test", "tests", "idle_test", "site-packages", "dist-packages"} & set(path.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and deliberately broken sources
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docs[ast.get_docstring(node) or ""] = None
    return "\n\n".join([*topics.values(), *docs])


def encode(text: str, vocab: int) -> tuple[Tensor, int]:
    """Encode `text` with byte pairs learned from it; return the tokens and the size of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return torch.tensor(tokenizer.encode(text).ids), tokenizer.get_vocab_size()


# ---- model ---------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # [batch, context, width]
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self, vocab: int, context: int, layers: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads=max(1, width // 64)) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:  # [batch, context] -> logits [batch, context, vocab]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


# ---- one run, in its own process -----------------------------------------------------------------


class PeakMemory:
    """Peak memory of the process, or of the GPU, beyond that at construction, in bytes."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            with suppress(OSError):  # where it is not permitted an earlier peak counts as the start
                Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
        self.start = self._peak()

    def _peak(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        if sys.platform == "linux":
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.split("VmHWM:")[1].split()[0])
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS

    def added(self) -> int:
        return self._peak() - self.start


class Training:
    def __init__(self, name: str, settings: Settings, tokens: Tensor) -> None:
        torch.manual_seed(settings.seed)
        torch.set_float32_matmul_precision("high")
        self.cross_entropy = importlib.import_module(LOSSES[name]).cross_entropy
        self.settings = settings
        self.tokens = tokens
        self.batches = torch.Generator().manual_seed(settings.seed)
        model = GPT(settings.vocab, settings.context, settings.layers, settings.width)
        self.model = model.to(settings.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), fused=True
        )
        self.memory = PeakMemory(settings.device)

    def now(self) -> float:
        if self.settings.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def next_batch(self) -> tuple[Tensor, Tensor]:
        s = self.settings
        starts = torch.randint(len(self.tokens) - s.context, (s.batch, 1), generator=self.batches)
        windows = self.tokens[starts + torch.arange(s.context + 1)].to(s.device)
        return windows[:, :-1], windows[:, 1:]

    def step(self) -> Step:
        """Take one step; the graph is cut at the logits, so that the loss, forward and backward, is timed alone."""
        inputs, targets = self.next_batch()
        begin = self.now()
        logits = self.model(inputs).flatten(0, 1)  # [batch * context, vocab]
        leaf = logits.detach().requires_grad_()

        loss_begin = self.now()
        loss = self.cross_entropy(leaf, targets.flatten())
        (grad,) = torch.autograd.grad(loss, leaf)
        loss_end = self.now()

        logits.backward(grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(loss.item(), self.now() - begin, loss_end - loss_begin)


def work(connection: Connection, name: str, settings: Settings, tokens: bytes) -> None:
    """Run in a child process: receive numbers of steps, take them and send them; send the peak memory for 0."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    training = Training(name, settings, torch.frombuffer(bytearray(tokens), dtype=torch.int64))
    connection.send(torch.get_num_threads())
    with suppress(EOFError):  # the parent has gone
        while count := connection.recv():
            connection.send([training.step() for _ in range(count)])
        connection.send(training.memory.added())


# ---- both runs -----------------------------------------------------------------------------------


def train_both(settings: Settings, tokens: Tensor, max_seconds: float, console: Console) -> dict[str, Run]:
    """Train both in turns until `settings.steps` are taken, or `max_seconds` are over."""
    processes = multiprocessing.get_context("spawn")
    children, connections, runs = [], {}, {}
    columns = [TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        bars = {name: progress.add_task(name, total=settings.steps, loss=float("nan")) for name in LOSSES}
        try:
            for name in LOSSES:
                connections[name], theirs = processes.Pipe()
                child = processes.Process(
                    target=work, args=(theirs, name, settings, tokens.numpy().tobytes())
                )
                child.start()
                theirs.close()
                children.append(child)
                runs[name] = Run([], threads=connections[name].recv())
            order = list(LOSSES)
            begin = time.monotonic()
            for done in range(0, settings.steps, TURN):
                if done >= MIN_STEPS and time.monotonic() - begin > max_seconds:
                    break
                for name in order:
                    connections[name].send(min(TURN, settings.steps - done))
                    runs[name].steps += connections[name].recv()
                    progress.update(
                        bars[name], completed=len(runs[name].steps), loss=runs[name].steps[-1].loss
                    )
                order.reverse()
            for name, run in runs.items():
                connections[name].send(0)
                run.peak_bytes = connections[name].recv()
        except (EOFError, BrokenPipeError):
            raise SystemExit(f"the {name} run stopped early; its error is above") from None
        finally:
            for connection in connections.values():
                connection.close()
            for child in children:
                child.join()
    return runs


def arguments(argv: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description="Trains a small GPT twice, with torch's cross-entropy and with fastloss's, and compares.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    steps_help = f"optimizer steps of each run; 0: {STEPS}, or what {PATIENCE:.0f} s allow"
    parser.add_argument("--steps", type=int, default=0, help=steps_help)
    parser.add_argument("--batch", type=int, default=64 if cuda else 8, help="sequences per step")
    parser.add_argument("--context", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--vocab", type=int, default=16384, help="size of the byte-pair vocabulary")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--width", type=int, default=256, help="width of the model, a multiple of 64")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--text", type=Path, help="UTF-8 text to train on instead of CPython's documentation")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="folder of the plot and the results"
    )
    args = parser.parse_args(argv)
    if args.steps < 0 or args.threads < 0:
        parser.error("--steps and --threads must not be negative")
    for name in ("batch", "context", "layers", "width"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.width > 64 and args.width % 64:
        parser.error("--width must be a multiple of 64, the width of an attention head")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with console.status("reading and encoding the text"):
        text = args.text.read_text(encoding="utf-8") if args.text else python_text()
        tokens, vocab = encode(text, args.vocab)
    console.print(
        f"{args.text or 'Documentation of CPython'}: "
        f"{len(text):,} characters, {len(tokens):,} tokens of {vocab:,}"
    )
    if vocab < args.vocab:
        console.print(f"[yellow]the text yields {vocab:,} pieces only, not {args.vocab:,}")
    if len(tokens) <= args.context:
        raise SystemExit(
            f"the text is too short: {len(tokens)} tokens, and a sequence takes {args.context + 1}"
        )

    given = {name: getattr(args, name) for name in ("batch", "context", "layers", "width", "threads", "seed")}
    settings = Settings(steps=args.steps or STEPS, vocab=vocab, device=device, **given)
    runs = train_both(settings, tokens, float("inf") if args.steps else PATIENCE, console)
    taken = len(runs["torch"].steps)
    if taken < settings.steps:
        console.print(
            f"[yellow]stopped after {taken} steps: {PATIENCE:.0f} s are over; --steps takes them all"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    save(runs, settings, args.out / "train_lm.json")
    draw(runs, settings, args.out / "train_lm.png")
    console.print(table(runs, settings))
    console.print(f"plot and results: {args.out / 'train_lm.png'}, {args.out / 'train_lm.json'}")
    return 0 if agree(runs, console) else 1


if __name__ == "__main__":
    sys.exit(main())
