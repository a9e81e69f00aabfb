"""Logits to draw from, with everything that makes an argmax ambiguous, and what is right for them."""

from __future__ import annotations

import torch

from lorax_kernels.greedy import IDS, LOGIT_LIMIT, SCORED, GreedyMemory, draw_greedy

NAN, INF = float("nan"), float("inf")


def make_logits(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Few distinct values, so that every row has ties, also across programs; every seventh row is odd in some way."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-40, 41, (rows, vocab), generator=generator).to(dtype) / 8
    for row in range(0, rows, 7):
        kind = row // 7 % 6
        if kind == 0:
            logits[row, vocab // 3] = logits[row, vocab - 1] = NAN
            logits[row, vocab // 4] = INF
        elif kind == 1:
            logits[row, vocab // 2 :] = INF
        elif kind == 2:
            logits[row] = -INF
        elif kind == 3:
            logits[row] = NAN
        elif kind == 4:
            logits[row, :-1] = -INF
        else:
            logits[row, :] = 1.0
    return logits


def expected(logits: torch.Tensor, mode: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """ids int64 [R] and, if scored, logprobs float64 [R]. Of equal logits the lowest id: torch leaves that open, so
    it is not asked for an argmax."""
    x = logits.double()
    if mode == IDS:
        x = torch.where(x.isnan(), INF, x.clamp(max=1e300))
    else:
        x = torch.nan_to_num(x, nan=-LOGIT_LIMIT, posinf=LOGIT_LIMIT, neginf=-LOGIT_LIMIT)
    columns = torch.arange(x.shape[1]).expand_as(x)
    ids = torch.where(x == x.max(1, keepdim=True).values, columns, x.shape[1]).min(1).values
    if mode == IDS:
        return ids, None
    return ids, torch.log_softmax(x, 1).gather(1, ids[:, None]).squeeze(1)


def check_drawing(rows: int, vocab: int, dtype: torch.dtype, device: str) -> None:
    """Draw in both modes, with every fifth row nobody's, again and again from the same memory."""
    last_token = torch.full((rows + 3,), -9, dtype=torch.int64, device=device)
    memory = GreedyMemory(last_token, rows, vocab, turns=3)
    for turn, mode in ((2, IDS), (0, SCORED), (1, IDS), (2, SCORED)):
        logits = make_logits(rows, vocab, dtype, seed=turn)
        slots = torch.randperm(rows + 3, generator=torch.Generator().manual_seed(turn))[:rows]
        slots[4::5] = -1
        mine = slots >= 0
        last_token.fill_(-9)
        memory.ids.fill_(-7)
        memory.logprobs.fill_(-7.0)
        control = torch.tensor([mode, turn], dtype=torch.int32)
        given = torch.full((rows, vocab + 16), NAN, dtype=dtype)
        given[:, :vocab] = logits
        draw_greedy(given.to(device)[:, :vocab], control.to(device), slots.to(device), memory)
        if device != "cpu":
            torch.cuda.synchronize()
        ids, logprobs = expected(logits, mode)
        want = torch.full((rows + 3,), -9, dtype=torch.int64)
        want[slots[mine]] = ids[mine]
        assert torch.equal(last_token.cpu(), want)
        assert torch.equal(memory.ids[turn], torch.where(mine, ids, -7).to(torch.int32))
        untouched = [other for other in range(3) if other != turn]
        assert bool((memory.ids[untouched] == -7).all())
        assert bool((memory.logprobs[untouched] == -7).all())
        if logprobs is None:
            assert bool((memory.logprobs == -7).all())
        else:
            assert bool((memory.logprobs[turn][~mine] == -7).all())
            torch.testing.assert_close(
                memory.logprobs[turn][mine], logprobs[mine].float(), atol=1e-5, rtol=1e-5
            )
