"""What two processes do with a bank of embeddings in tests of MCL-OKD; `share` of a batch goes to each."""

from __future__ import annotations

from pathlib import Path

import torch
from forked import fork_all
from method_truths import CLASSES, batch, make_cohort
from torch import distributed as dist

from fflfast.cohort import Learner
from fflfast.data import Batch
from fflfast.methods.mcl_okd import MCL, MCLOptions
from fflfast.training.processes import start

TARGETS = torch.arange(30) % CLASSES
SHARES = [(6, 6), (7, 5), (3, 0)]
"""Of each step, how many images the first and the second process have."""


def learner(rank: int | None) -> Learner:
    """The same in every process, with norms that keep their statistics, so that shares compute what a batch does."""
    cohort = make_cohort(3, dtype=torch.float64).eval()
    torch.manual_seed(5)
    own = Learner(cohort, MCL(cohort, CLASSES, MCLOptions(negatives=4, embedding_size=6))).double()
    torch.manual_seed(100 + (rank or 0))  # as in a run, where PyTorch's generator is each process's own by then
    own.method.attach(TARGETS)
    return own


def given(step: int) -> Batch:
    """The whole batch of a step."""
    rows = sum(SHARES[step])
    images = batch(rows, dtype=torch.float64, seed=step).images
    index = torch.randperm(len(TARGETS), generator=torch.Generator().manual_seed(step))[:rows]
    return Batch(images, TARGETS[index], index)


def steps(rank: int | None) -> dict[str, torch.Tensor]:
    """The bank after each step, and the sum over all images of contrast and of its gradient; None: of all at once."""
    own, found = learner(rank), {}
    for step, shares in enumerate(SHARES):
        whole = given(step)
        start_row = 0 if rank is None else sum(shares[:rank])
        stop = sum(shares) if rank is None else start_row + shares[rank]
        part = Batch(*(value[start_row:stop] for value in whole))
        own.zero_grad()
        ((_, contrast),) = own.method.extra_terms(own.cohort(part.images), part, None)
        (contrast * (stop - start_row)).backward()
        sums = [contrast.detach() * (stop - start_row), *(p.grad for p in own.method.parameters())]
        if rank is not None:
            for value in sums:
                dist.all_reduce(value)
        found |= {f"{step}/{k}": value.clone() for k, value in enumerate(sums)}
        found |= {f"{step}/{name}": buffer.clone() for name, buffer in own.method.named_buffers()}
    if not rank:  # an evaluation, of one process alone
        own.eval().method.extra_terms(own.cohort(given(0).images), given(0), None)
    return found


def both() -> None:
    with start("cpu", plan="serial") as p:
        torch.save(steps(p.rank), f"bank-{p.rank}.pt")


def drive() -> None:
    """Write what a single process and each of two find to bank.pt, bank-0.pt and bank-1.pt."""
    torch.save(steps(None), Path("bank.pt"))
    fork_all({"bank": both})
