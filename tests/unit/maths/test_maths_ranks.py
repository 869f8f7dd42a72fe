"""What takes a process group: two gloo ranks must give the values and gradients of one with all rows."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from rayalign.maths.disagreement import DIVERGENCES, batch_log_mass, dpm_loss
from rayalign.maths.preference import kto_pair_loss, kto_reference_point
from rayalign.maths.reduce import masked_var, whiten
from tests.ranks import spawn

torch.set_num_threads(1)
ROWS = 5
SPLITS = {"even-ish": (2, 3), "uneven": (1, 4), "none on the second": (5, 0), "none on the first": (0, 5)}


def inputs(rows: slice) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    full = {
        "logits": torch.randn(ROWS, 3, dtype=torch.float64, generator=generator),
        "prior": torch.softmax(torch.randn(ROWS, 3, dtype=torch.float64, generator=generator), -1),
        "x": torch.randn(ROWS, 4, dtype=torch.float64, generator=generator) + 2,
        "chosen": torch.randn(ROWS, dtype=torch.float64, generator=generator) + 1,
        "rejected": torch.randn(ROWS, dtype=torch.float64, generator=generator) + 0.5,
        "weight": torch.randn(ROWS, 4, dtype=torch.float64, generator=generator),
        "row_mask": torch.tensor([1, 0, 1, 1, 0]),
    }
    full["mask"] = torch.rand(ROWS, 4, generator=generator) < 0.6
    full["x"] = full["x"].masked_fill(~full["mask"], torch.nan)
    full["logits"][1] = torch.nan
    return {name: tensor[rows].clone() for name, tensor in full.items()}


def results(data: dict[str, torch.Tensor], group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Values by rank-independent name; those that start with "rows" hold one entry a row."""
    logits = data["logits"].requires_grad_()
    clean = torch.where(data["row_mask"].unsqueeze(-1) == 1, logits, torch.zeros_like(logits))
    out = {}
    for divergence in DIVERGENCES:
        for detach in (False, True):
            options = {"divergence": divergence, "detach_posterior": detach, "group": group}
            masked = dpm_loss(logits, data["prior"], mask=data["row_mask"], **options)
            whole = dpm_loss(clean, data["prior"], **options)
            for kind, loss in (("masked", masked), ("whole", whole)):
                name = f"{divergence} {detach} {kind}"
                weights = data["weight"][:, 0]
                (grad,) = torch.autograd.grad((loss * weights).sum(), logits, retain_graph=True)
                out[f"rows dpm {name}"], out[f"rows dpm gradient {name}"] = loss.detach(), grad
    out["mass"] = batch_log_mass(clean, group=group).detach()
    x, mask = data["x"].requires_grad_(), data["mask"]
    for shift in (True, False):
        white = whiten(x, mask, shift_mean=shift, group=group)
        (grad,) = torch.autograd.grad((white * data["weight"]).sum(), x)
        out[f"rows whiten {shift}"], out[f"rows whiten gradient {shift}"] = white.detach(), grad
    out["var"] = masked_var(x, mask, group=group).detach()
    out["no var"] = masked_var(x, mask * False, group=group).detach()
    chosen, rejected = data["chosen"], data["rejected"]
    zero = torch.zeros_like(chosen)
    out["z"] = kto_reference_point(chosen, rejected, group=group)
    pair = kto_pair_loss(chosen, rejected, zero, zero, beta=0.3, group=group)
    out["rows kto chosen"], out["rows kto rejected"] = pair[: len(chosen)], pair[len(chosen) :]
    return out


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for name, split in SPLITS.items():
        start = sum(split[:rank])
        found = results(inputs(slice(start, start + split[rank])), dist.group.WORLD)
        torch.save(found, f"{folder}/{name}.{rank}.pt")
    dist.barrier()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    spawn(worker, (folder,), 2)
    return {name: [torch.load(f"{folder}/{name}.{rank}.pt") for rank in range(2)] for name in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_are_one(two_ranks, split):
    whole = results(inputs(slice(0, ROWS)), None)
    first, second = two_ranks[split]
    for name, expected in whole.items():
        assert torch.isfinite(expected).all(), name
        if name.startswith("rows"):
            torch.testing.assert_close(torch.cat([first[name], second[name]]), expected, msg=lambda m, n=name: n + m)
        else:
            torch.testing.assert_close(first[name], expected)
            torch.testing.assert_close(second[name], expected)
    assert (whole["rows dpm gradient kl_q_r False whole"] != whole["rows dpm gradient kl_q_r True whole"]).any()
