"""What test_distributed.py runs in its processes: converted models against stock ones, bit for bit.

A check takes the rank of its process and a folder that all ranks share.
"""

import datetime
import json
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import relu_ext

RANKS = 2
COLLECTIVE = datetime.timedelta(seconds=60)  # a rank that waits longer for another gives the check up
STEPS = 3
NODES = {"ReLUBackward", "HardtanhBackward", "LeakyReLUBackward"}  # of the activations below, if kernels ran


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3),
        nn.ReLU6(),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 16),
        nn.LeakyReLU(0.1),
        nn.Linear(16, 4),
    )


def feed_forward() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.LeakyReLU(0.1), nn.Linear(16, 16), nn.ReLU6()]
    return nn.Sequential(*layers, nn.Linear(16, 4))


def images(rank: int) -> Tensor:
    return torch.randn(STEPS, 5, 3, 6, 6, generator=torch.Generator().manual_seed(rank))


def rows(rank: int) -> Tensor:
    return torch.randn(STEPS, 5, 16, generator=torch.Generator().manual_seed(rank))


def converted(model: nn.Module) -> nn.Module:
    assert relu_ext.convert(model)
    return model


def both(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """The stock model and the converted one."""
    return build(), converted(build())


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def train(model: nn.Module, batches: Tensor, optimiser: torch.optim.Optimizer | None = None) -> list[Tensor]:
    """The loss of each step."""
    optimiser = optimiser or adam(model)
    losses = []
    for batch in batches:
        loss = model(batch).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return losses


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_equal(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(whole(a), whole(b))


def assert_train_alike(theirs: nn.Module, ours: nn.Module, batches: Tensor) -> None:
    before = [whole(parameter).clone() for parameter in ours.parameters()]
    assert_equal(train(ours, batches), train(theirs, batches))
    assert_equal(ours.parameters(), theirs.parameters())
    assert_equal(ours.buffers(), theirs.buffers())
    assert not any(torch.equal(old, whole(new)) for old, new in zip(before, ours.parameters(), strict=True))


class Seen:
    """What the activations of a model make from now on: types of tensors and names of nodes."""

    def __init__(self, model: nn.Module) -> None:
        self.types: set[type] = set()
        self.nodes: set[str] = set()
        for module in model.modules():
            if type(module).__module__.startswith("relu_ext"):
                module.register_forward_hook(self.note)

    def note(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.types.add(type(output))
        self.nodes.add(output.grad_fn.name())


class Residual(nn.Module):
    """What fuse changes without rounding elsewhere: an addition and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.relu = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(input))) + input)


def residuals() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Residual(), Residual())


def fused(model: nn.Module) -> nn.Module:
    report = relu_ext.fuse(converted(model))
    assert [after for _, after in report.values()] == ["relu_ext.add_relu"] * 2, report
    return model


# DistributedDataParallel


def data_parallel(rank: int, folder: Path) -> None:
    theirs, ours = both(convolutions)
    seen = Seen(ours)
    assert_train_alike(DistributedDataParallel(theirs), DistributedDataParallel(ours), images(rank))
    assert seen.nodes == NODES


def data_parallel_converted_afterwards(rank: int, folder: Path) -> None:
    theirs, ours = DistributedDataParallel(convolutions()), converted(DistributedDataParallel(convolutions()))
    seen = Seen(ours)
    assert_train_alike(theirs, ours, images(rank))
    assert seen.nodes == NODES


def data_parallel_with_a_static_graph(rank: int, folder: Path) -> None:
    options = {"static_graph": True, "gradient_as_bucket_view": True}
    assert_train_alike(*(DistributedDataParallel(model, **options) for model in both(convolutions)), images(rank))


def data_parallel_without_synchronisation(rank: int, folder: Path) -> None:
    """The gradients of two batches are added up before they are exchanged."""

    def gradients(model: nn.Module) -> list[Tensor]:
        wrapped = DistributedDataParallel(model)
        first, second, _ = images(rank)
        with wrapped.no_sync():
            wrapped(first).square().mean().backward()
        wrapped(second).square().mean().backward()
        return [parameter.grad for parameter in model.parameters()]

    theirs, ours = map(gradients, both(convolutions))
    assert_equal(ours, theirs)


def data_parallel_fused(rank: int, folder: Path) -> None:
    theirs, ours = residuals(), fused(residuals())
    assert_train_alike(DistributedDataParallel(theirs), DistributedDataParallel(ours), images(rank))


# FSDP2


def sharded(model: nn.Module, **options) -> nn.Module:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def fully_sharded(rank: int, folder: Path) -> None:
    theirs, ours = map(sharded, both(feed_forward))
    assert all(isinstance(parameter, DTensor) for parameter in ours.parameters())
    seen = Seen(ours)
    assert_train_alike(theirs, ours, rows(rank))
    assert seen.nodes == NODES


def fully_sharded_in_bfloat16(rank: int, folder: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    theirs, ours = (sharded(model, mp_policy=policy) for model in both(feed_forward))
    seen = Seen(ours)
    assert_train_alike(theirs, ours, rows(rank))
    assert seen.nodes == NODES


def fully_sharded_converted_afterwards(rank: int, folder: Path) -> None:
    """fully_shard has changed the class of the model and of its layers: they keep it."""
    theirs, ours = sharded(feed_forward()), sharded(feed_forward())
    shards = [module for module in ours.modules() if isinstance(module, FSDPModule)]
    converted(ours)
    assert [module for module in ours.modules() if isinstance(module, FSDPModule)] == shards
    seen = Seen(ours)
    assert_train_alike(theirs, ours, rows(rank))
    assert seen.nodes == NODES


def shards_of_blocks(model: nn.Module) -> nn.Module:
    for block in model:
        fully_shard(block)
    return fully_shard(model)


def fully_sharded_fused(rank: int, folder: Path) -> None:
    assert_train_alike(shards_of_blocks(residuals()), shards_of_blocks(fused(residuals())), images(rank))


def fully_sharded_fused_afterwards(rank: int, folder: Path) -> None:
    assert_train_alike(shards_of_blocks(residuals()), fused(shards_of_blocks(residuals())), images(rank))


# Tensor-parallel layers


def parallelized(model: nn.Module) -> nn.Module:
    """Columns, an activation on DTensors of which each rank has a part, rows."""
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()})


def tensor_parallel(rank: int, folder: Path) -> None:
    for activation in (nn.ReLU, nn.LeakyReLU, nn.ELU):  # of the others torch shards none

        def layers(activation=activation) -> nn.Module:
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(16, 24), activation(), nn.Linear(24, 4))

        theirs, ours = both(layers)
        seen = Seen(ours)
        assert_train_alike(parallelized(theirs), parallelized(ours), rows(rank=0))
        assert seen.types == {DTensor}


# Checkpoints


def state(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, dict]:
    return dict(zip(("model", "optimiser"), get_state_dict(model, optimiser), strict=True))


def resumes(trained: nn.Module, other: nn.Module, rank: int, folder: Path) -> None:
    """``other`` takes over the training from a checkpoint."""
    first, *rest = rows(rank)
    optimisers = adam(trained), adam(other)
    train(trained, [first], optimisers[0])
    dcp.save(state(trained, optimisers[0]), checkpoint_id=folder)
    loaded = state(other, optimisers[1])
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(other, optimisers[1], model_state_dict=loaded["model"], optim_state_dict=loaded["optimiser"])
    assert_equal(train(other, rest, optimisers[1]), train(trained, rest, optimisers[0]))
    assert_equal(other.parameters(), trained.parameters())


def anew(model: nn.Module) -> nn.Module:
    """Other parameters, so that nothing fits that was not loaded."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


def checkpoint_of_a_stock_model(rank: int, folder: Path) -> None:
    resumes(sharded(feed_forward()), sharded(anew(converted(feed_forward()))), rank, folder)


def checkpoint_of_a_converted_model(rank: int, folder: Path) -> None:
    resumes(sharded(converted(feed_forward())), sharded(anew(feed_forward())), rank, folder)


def checkpoint_of_shards_for_a_whole_model(rank: int, folder: Path) -> None:
    """From FSDP2 to DistributedDataParallel, whose mean of gradients is the same sum of two, halved."""
    resumes(sharded(feed_forward()), DistributedDataParallel(anew(converted(feed_forward()))), rank, folder)


CHECKS: tuple[Callable[[int, Path], None], ...] = (
    data_parallel,
    data_parallel_converted_afterwards,
    data_parallel_with_a_static_graph,
    data_parallel_without_synchronisation,
    data_parallel_fused,
    fully_sharded,
    fully_sharded_in_bfloat16,
    fully_sharded_converted_afterwards,
    fully_sharded_fused,
    fully_sharded_fused_afterwards,
    tensor_parallel,
    checkpoint_of_a_stock_model,
    checkpoint_of_a_converted_model,
    checkpoint_of_shards_for_a_whole_model,
)


def outcome(check: Callable[[int, Path], None], rank: int, folder: Path) -> str:
    """Empty, or the error. Each check has a process group of its own: one that fails leaves nothing to the next."""
    try:
        store = dist.FileStore(str(folder / f"{check.__name__}.store"), RANKS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=COLLECTIVE)
        check(rank, folder / check.__name__)
        dist.barrier()  # nobody leaves while the other still reads
    except Exception:
        return traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return ""


def run(rank: int, folder: Path) -> None:
    """Makes every check and writes its outcome to a file of its own, for ``outcomes``."""
    torch.set_num_threads(1)
    for check in CHECKS:
        (folder / f"{check.__name__}.{rank}").write_text(json.dumps(outcome(check, rank, folder)))


def outcomes(folder: Path) -> dict[str, list[str | None]]:
    """For each check that of every rank; None where the process has not come to it."""
    files = {check.__name__: [folder / f"{check.__name__}.{rank}" for rank in range(RANKS)] for check in CHECKS}
    return {name: [json.loads(f.read_text()) if f.exists() else None for f in found] for name, found in files.items()}
