"""Many callers at once: Python threads, forked and spawned workers, signals, and the end of the interpreter."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from calls import CALLS
from operations import OPERATIONS, assert_same
from processes import in_child, run_script
from torch.autograd.graph import saved_tensors_hooks

import relu_ext
from relu_ext import _C

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
    with threads_kept():
        torch.set_num_threads(1)
        return steps(seed, times=1)


@contextlib.contextmanager
def threads_kept():
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def at_once(run, count=8, meanwhile=None) -> None:
    """run(0), run(1), ... in threads that start together; meanwhile(), again and again, in this one."""
    errors, barrier = [], threading.Barrier(count)

    def guarded(number):
        try:
            barrier.wait()
            run(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    while meanwhile and any(thread.is_alive() for thread in threads):
        meanwhile()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    while any(Path(f"/proc/self/task/{thread.native_id}").exists() for thread in threads):
        time.sleep(0.001)  # to be forked without a lock of theirs: AddressSanitizer's are not free at once
    if errors:
        raise errors[0]


@pytest.mark.parametrize("pool", [1, 2])
def test_python_threads(pool):
    """Each with kernels on torch's pool of that many threads, forward and backward."""
    truth, found = [expected(seed) for seed in range(CALLERS)], [None] * CALLERS

    def run(seed):
        torch.set_num_threads(pool)
        found[seed] = steps(seed)

    with threads_kept():
        at_once(run, CALLERS)
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


# Threads of Python

WITHOUT_GIL = (5, 40, 33)  # more elements than are computed with the interpreter lock
WITH_GIL = (3, 4, 9)


def all_results(shape):
    return {name: call.results(call.function, call.inputs(shape)) for name, call in CALLS.items()}


@pytest.mark.parametrize("shape", [WITH_GIL, WITHOUT_GIL], ids=["small", "large"])
def test_all_operations_from_eight_threads(shape):
    """Forward and backward, each thread beginning with another one, and one with a graph of its own for each."""
    truth = all_results(shape)
    names = list(CALLS)

    def run(number):
        for name in names[number * 5 :] + names[: number * 5]:
            call = CALLS[name]
            for ours, theirs in zip(call.results(call.function, call.inputs(shape)), truth[name], strict=True):
                assert torch.equal(ours, theirs)

    at_once(run)


@pytest.mark.parametrize("shape", [WITH_GIL, WITHOUT_GIL], ids=["small", "large"])
def test_one_graph_backward_from_eight_threads(shape):
    """It is kept, and freed by none; gradients that accumulate in leaves are all there."""
    graphs = []
    for call in CALLS.values():
        leaves = call.leaves(call.inputs(shape))
        output = call.function(*leaves)
        graphs.append((call, output, leaves, call.gradients(output, leaves, retain_graph=True)))

    def run(_):
        for call, output, leaves, expected in graphs:
            assert all(map(torch.equal, call.gradients(output, leaves, retain_graph=True), expected))
            output.backward(torch.ones_like(output), retain_graph=True)

    at_once(run, 8)
    for _, _, leaves, expected in graphs:
        for leaf, gradient in zip((x for x in leaves if x.requires_grad), expected, strict=True):
            torch.testing.assert_close(leaf.grad, 8 * gradient)


def test_one_graph_is_freed_by_one_of_many():
    """Of threads that go backward without keeping the graph one or more get gradients, the others PyTorch's error."""
    for call in CALLS.values():
        leaves = call.leaves(call.inputs(WITHOUT_GIL))
        output = call.function(*leaves)
        expected = call.gradients(output, leaves, retain_graph=True)
        right = []

        def run(_, call=call, output=output, leaves=leaves, expected=expected, right=right):
            try:
                right.append(all(map(torch.equal, call.gradients(output, leaves), expected)))
            except RuntimeError as error:
                assert "a second time" in str(error)

        at_once(run, 4)
        assert right and all(right)


def test_number_of_threads_set_meanwhile():
    truth = [expected(seed) for seed in range(2)]
    numbers = itertools.cycle([1, 2, 3])

    def run(seed):
        for _ in range(3):
            torch.set_num_threads(seed + 1)
            for ours, theirs in zip(steps(seed, times=1), truth[seed], strict=True):
                assert_same(ours, theirs)

    with threads_kept():
        at_once(run, 2, meanwhile=lambda: torch.set_num_threads(next(numbers)))


INSTALLED = [row for row in OPERATIONS if row.name in ("relu", "hardtanh", "leaky_relu", "elu") and row.in_place]


def test_installed_and_uninstalled_meanwhile():
    """Whose kernel it is a call does not see, nor a backward pass whose forward has met the other."""
    inputs = torch.randn(9, 500, generator=torch.Generator().manual_seed(0))

    def results(row):
        leaf = inputs.clone().requires_grad_()
        output = row.definition(leaf)
        return output.detach(), torch.autograd.grad(output, leaf, torch.ones_like(output))[0]

    truth = [results(row) for row in INSTALLED]
    nodes = set()

    def run(_):
        for turn in range(10_000):
            for row, theirs in zip(INSTALLED, truth, strict=True):
                for a, b in zip(results(row), theirs, strict=True):
                    torch.testing.assert_close(a, b)
                nodes.add(F.relu(inputs.clone().requires_grad_()).grad_fn.name())
            if turn >= 12 and len(nodes) == 2:
                return

    def switch():
        with relu_ext.installed():
            time.sleep(0.0005)
        time.sleep(0.0005)

    at_once(run, 4, switch)
    assert nodes == {"ReLUBackward", "ReluBackward0"}
    assert not relu_ext.is_installed()


@pytest.fixture
def short_turns():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_monitor_counts_what_all_threads_compute(short_turns):
    """As of nn.DataParallel's replicas, or of an actor and a learner."""
    model = torch.nn.Sequential(relu_ext.ReLU(), relu_ext.LeakyReLU())
    data = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    times = 1000

    def run(_):
        for _ in range(times):
            model(data.clone().requires_grad_()).sum().backward()

    with relu_ext.Monitor(model, window=10**6) as monitor:
        at_once(run, meanwhile=lambda: (monitor.to_dict(), monitor.layers()))
        for layer in monitor.layers():
            torch.testing.assert_close(layer.inactive_by_channel, (data <= 0).double().mean(0))


# Locks: of the interpreter, and of a node that goes backward


@pytest.fixture
def endless_turns():
    """A thread that has the interpreter lock keeps it until it waits or releases it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(3600)
    yield
    sys.setswitchinterval(before)


LOCKING = {
    "relu": relu_ext.relu,
    "relu_": relu_ext.relu_,
    "reglu": lambda x: relu_ext.reglu(x, x),
    "bias_relu": lambda x: relu_ext.bias_relu(x, x, 0),
    "relu_dropout": relu_ext.relu_dropout,
}


def has_a_turn_meanwhile(call, input) -> bool:
    """Another thread, that waits for the interpreter lock, in one of twenty calls."""
    go, has_run = threading.Semaphore(0), threading.Event()
    other = threading.Thread(target=lambda: go.acquire() and has_run.set())
    other.start()
    go.release()
    outputs = []  # they stay: torch may release the lock when it frees one
    while len(outputs) < 20 and not has_run.is_set():
        outputs.append(call(input))
    meanwhile = has_run.is_set()
    other.join()
    return meanwhile


@pytest.mark.parametrize("elements, releases", [(4096, False), (1 << 22, True)], ids=["short", "long"])
@pytest.mark.parametrize("call", LOCKING.values(), ids=LOCKING)
def test_long_calls_release_the_interpreter_lock(call, elements, releases, endless_turns):
    """Long is what an idle core needs to wake up, and more; yet a busy machine may let it sleep: hence many tries."""
    assert any(has_a_turn_meanwhile(call, torch.ones(elements)) for _ in range(50)) == releases


def test_arguments_that_another_thread_lets_go():
    """A call holds what it computes with."""
    make = [torch.full((1 << 16,), float(value)) for value in range(8)]
    given = [tensor.clone() for tensor in make]

    def run(_):
        for k in itertools.islice(itertools.cycle(range(8)), 400):
            tensor = relu_ext.add_relu(given[k], given[k - 1])
            assert (tensor == float(k + (k - 1) % 8)).all()

    def let_go():
        for k, tensor in enumerate(make):
            given[k] = tensor.clone()

    at_once(run, 3, let_go)


def test_first_calls_within_function_modes():
    """What they compare modes with is imported by the first of them, while the others wait: in a new process."""
    run_script(
        """
        import sys

        import test_threads
        import torch
        from torch.overrides import TorchFunctionMode

        import relu_ext

        class Watch(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                return function(*args, **(kwargs or {}))

        sys.modules.pop("torch.utils._device", None)
        sys.setswitchinterval(1e-6)

        def run(_):
            with Watch():
                assert relu_ext.relu(torch.ones(3)).sum() == 3

        test_threads.at_once(run)
        """
    )


def test_bits_are_asked_for_while_their_node_goes_backward():
    """Its hook waits, for a thread that asks for the bits and holds the interpreter lock."""
    unpacking, asked = threading.Event(), threading.Event()

    def unpack(kept):
        unpacking.set()
        asked.wait(30)
        return kept

    with saved_tensors_hooks(lambda kept: kept, unpack):
        output = relu_ext.relu(torch.randn(50, 3, requires_grad=True))

    def run(number):
        if number:
            output.sum().backward()
            return
        assert unpacking.wait(30)
        kept, last = _C.cells(output, 3), _C.cells(output, 3)
        assert not _C.count_bits(output, 1, 1, kept, last)
        asked.set()

    at_once(run, 2)


# Signals


def assert_all_right():
    for call in CALLS.values():
        ours, theirs = (call.results(function, call.inputs()) for function in (call.function, call.definition))
        torch.testing.assert_close(ours, theirs)


def large_steps():
    leaf = torch.randn(1 << 20).requires_grad_()
    while True:
        relu_ext.bias_relu(relu_ext.elu(leaf).view(1024, -1), leaf[:1024]).sum().backward()


def test_keyboard_interrupt():
    """In a long loop of large calls: it ends, and the process is as good as before."""

    def interrupted():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for seconds in (0.05, 0.1, 0.15):
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                large_steps()
        assert_all_right()

    in_child([("SIGINT", interrupted)])


def test_signal_handler_that_computes():
    """A millisecond after the last, forward and backward, in the middle of whatever the main thread does.

    That may be the forward of a torch.autograd.Function, which runs without grad, as its interrupter then does.
    """

    def alarmed():
        call, handled = CALLS["elu(1.7)"], []
        inputs = call.inputs(WITHOUT_GIL)
        expected = call.results(call.function, inputs)

        @torch.enable_grad()
        def handle(*_):
            handled.append(call.results(call.function, inputs))
            signal.setitimer(signal.ITIMER_REAL, 0.001)

        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        while len(handled) < 200:
            assert_all_right()
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert all(all(map(torch.equal, results, expected)) for results in handled)

    in_child([("SIGALRM", alarmed)])


def test_fork_while_threads_compute():
    """The children compute, too: not dropout, whose generator one of the threads may hold, as of torch's own."""
    call = CALLS["bias_relu"]
    inputs = call.inputs((64, 64, 16))
    expected = call.results(call.function, inputs)
    left = iter(range(4))

    def same():
        assert all(map(torch.equal, call.results(call.function, inputs), expected))

    def run(_):
        while next(left, None) is not None:
            in_child([("forked", same)])
            same()

    at_once(run, 3, meanwhile=same)


# The end of the interpreter. In place: torch gives the lock away when it frees a tensor, and may then end the process.

COMPUTING = """
    import os, sys, threading
    import torch, relu_ext

    torch.set_num_threads(1)

    def compute(started):
        x = torch.randn(1 << 20)
        while True:
            relu_ext.relu_(x), relu_ext.elu_(x)
            started.set()

    for _ in range(3):
        started = threading.Event()
        threading.Thread(target=compute, args=(started,), daemon=True).start()
        started.wait()
"""
ENDS = {
    "the end of the script": "",
    "sys.exit": "sys.exit()",
    "os._exit": "os._exit(0)",
    "sys.exit in a thread": "thread = threading.Thread(target=sys.exit); thread.start(); thread.join()",
    "installed": "relu_ext.install()",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_the_interpreter_exits_while_daemon_threads_compute(end):
    run_script(textwrap.dedent(COMPUTING) + end)
