"""Decoding on a CPU, side by side with transformers: SmolLM2-135M in float32, greedy, batch 8, same prompts, one run.

    python perf/cpu_decode.py [--model FOLDER] [--batch 8] [--new-tokens 64] [--rounds 3]

The two take turns, and the best round of each counts, so that a noisy machine is noisy for both. Exits 1 if this
project is the slower one. Every token of both is compared as well.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from lorax_backend.config import ServerConfig
from lorax_backend.model.runner import TorchModelRunner
from lorax_backend.scheduler.sequence import ScheduledBatch, ScheduledSequence, Sequence
from lorax_backend.types import SamplingParams

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "In the morning the farmer",
    "The three primary colours are",
    "A computer program consists of",
    "She opened the letter and",
    "The largest planet of the solar system",
    "To bake bread you need",
)


def main() -> int:
    options = _options()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    prompts = _prompts(options.model, options.batch)
    runner = TorchModelRunner(
        ServerConfig(model_id=str(options.model), device="cpu", num_blocks=1024), options.model
    )
    peer = _Transformers(options.model)
    ours, theirs = [], []
    for _ in range(options.rounds):
        begin = time.perf_counter()
        expected = peer.generate(prompts, options.new_tokens)
        theirs.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        got = generate(runner, prompts, options.new_tokens)
        ours.append(time.perf_counter() - begin)
    tokens = options.batch * options.new_tokens
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), batch {options.batch}, float32, greedy"
    )
    print(f"prompts of {len(prompts[0])} tokens, {options.new_tokens} new tokens each; prefill is included")
    for name, seconds in (("transformers generate", theirs), ("lorax-triton", ours)):
        rounds = " ".join(f"{tokens / value:.1f}" for value in seconds)
        print(f"{name:24s} {tokens / min(seconds):7.1f} tokens/s   (rounds: {rounds})")
    same = sum(a == b for a, b in zip(got, expected, strict=True))
    print(f"speedup {min(theirs) / min(ours):.2f}; {same} of {len(prompts)} answers equal token by token")
    return 0 if min(ours) <= min(theirs) else 1


def generate(runner: TorchModelRunner, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy answers of all prompts, decoded in one batch that starts with one prefill step."""
    params = SamplingParams(max_new_tokens=new_tokens)
    sequences: list[Sequence] = []
    blocks = 0
    for slot, ids in enumerate(prompts):
        needed = -(-(len(ids) + new_tokens) // 16)
        handle = time.perf_counter_ns()  # a new identity, so that nothing of the last round is reused
        seq = Sequence(handle, len(ids), params, None, 0, 0.0, token_ids=list(ids), slot=slot)
        seq.block_table = list(range(blocks, blocks + needed))
        blocks += needed
        sequences.append(seq)
    starts = [0] * len(sequences)
    for _ in range(new_tokens):
        items = [
            ScheduledSequence(
                seq, start, len(seq.token_ids) - start, sample=True, generated_index=seq.num_generated
            )
            for seq, start in zip(sequences, starts, strict=True)
        ]
        starts = [len(seq.token_ids) for seq in sequences]
        drawn = runner.launch(ScheduledBatch(items, sum(item.count for item in items))).result()
        for seq, token in zip(sequences, drawn.token_ids, strict=True):
            seq.token_ids.append(token)
    return [seq.token_ids[seq.prompt_len :] for seq in sequences]


class _Transformers:
    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return [row[ids.shape[1] :] for row in out.tolist()]


def _prompts(folder: Path, count: int) -> list[list[int]]:
    """`count` prompts of equal length: transformers then needs no padding, which would cost it speed."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(PROMPTS[index % len(PROMPTS)])["input_ids"] for index in range(count)]
    length = min(len(row) for row in ids)
    return [row[:length] for row in ids]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="Hugging Face model folder; default: the built-in SmolLM2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.model is None:
        from lorax_backend.smollm2 import ensure_smollm2

        options.model = ensure_smollm2()
    return options


if __name__ == "__main__":
    sys.exit(main())
