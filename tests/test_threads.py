"""Many callers at once: Python threads, forked and spawned workers, one thread alone."""

import multiprocessing
import threading

import pytest
import torch
from operations import assert_same

import relu_ext

ELEMENTS = 1 << 18  # several threads' shares
CALLERS = 4


def steps(seed: int, times: int = 5) -> list[torch.Tensor]:
    """Outputs and gradients of steps through three kinds of kernels, of which one sums over channels."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(64, ELEMENTS // 64, generator=make).requires_grad_()
    bias = torch.randn(ELEMENTS // 64, generator=make).requires_grad_()
    found = []
    for _ in range(times):
        outputs = [relu_ext.relu(x), relu_ext.elu(x), relu_ext.bias_relu(x, bias)]
        found = [*(y.detach() for y in outputs), *torch.autograd.grad(sum(outputs), (x, bias), x.detach())]
    return found


def expected(seed: int) -> list[torch.Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return steps(seed, times=1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("pool", [1, 2])
def test_python_threads(pool):
    """Each with kernels on torch's pool of that many threads, forward and backward."""
    truth, found, errors = [expected(seed) for seed in range(CALLERS)], [None] * CALLERS, []
    before, barrier = torch.get_num_threads(), threading.Barrier(CALLERS)

    def run(seed):
        try:
            torch.set_num_threads(pool)
            barrier.wait()
            found[seed] = steps(seed)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert not errors
    for ours, theirs in zip(found, truth, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)


def work(queue, seed):
    torch.set_num_threads(1)  # as a DataLoader's workers do
    queue.put([tensor.numpy() for tensor in steps(seed, times=1)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_process(method):
    """Also where the parent's kernels have used the pool before, whose threads a forked child does not have."""
    steps(0, times=1)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=work, args=(queue, 3)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    for ours in found:
        for a, b in zip(ours, expected(3), strict=True):
            assert_same(torch.from_numpy(a), b)


def test_data_loader_worker():
    """relu in a dataset, in processes forked by DataLoader."""

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return relu_ext.relu(torch.arange(-ELEMENTS // 2, ELEMENTS // 2) * float(index + 1))

    loader = torch.utils.data.DataLoader(Rows(), num_workers=2, multiprocessing_context="fork")
    for index, (row,) in enumerate(loader):
        assert_same(row, torch.relu(torch.arange(-ELEMENTS // 2, ELEMENTS // 2) * float(index + 1)))
