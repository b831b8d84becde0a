"""What accompanies a graph: its nodes and their hooks, its life, the profiler, anomaly mode, threads."""

import threading
import weakref

import pytest
import torch
from composing import (
    Watch,
    assert_all_same,
    error_of,
    in_place,
    leaf,
    node_name,
    numbers,
    output_and_gradient,
    over_forms,
)
from operations import REPRESENTATIVE, assert_same
from torch.profiler import ProfilerActivity, profile

ROWS = REPRESENTATIVE


# Nodes, edges and hooks


@pytest.mark.one_node
def test_node_hooks_change_gradients(operation, device):
    def run(relu):
        middle = (input := leaf(5, 7, device=device)) * 1
        output = relu(middle)
        output.register_hook(lambda grad: grad * 3)
        output.grad_fn.register_prehook(lambda grads: (grads[0] + 1,))
        output.grad_fn.register_hook(lambda grads, _: (grads[0] - 5,))
        middle.register_hook(lambda grad: grad * 7)
        output.retain_grad()
        middle.retain_grad()
        output.backward(numbers(5, 7, device=device, seed=1))
        return output.grad, middle.grad, input.grad

    assert_all_same(run(operation.function), run(operation.definition))


@pytest.mark.in_place
def test_hooks_of_a_tensor_changed_in_place(operation, device):
    def run(relu_):
        output = (input := leaf(5, 7, device=device)) * 1
        output.register_hook(lambda grad: grad * 3)
        output.retain_grad()
        relu_(output)
        output.register_hook(lambda grad: grad - 1)
        output.retain_grad()
        output.backward(numbers(5, 7, device=device, seed=1))
        return output.grad, input.grad

    assert_all_same(run(operation.function_), run(operation.definition_))


def test_node_describes_itself(operation, device):
    middle = leaf(5, 7, device=device) * 1
    node = operation.function(middle).grad_fn
    assert node.name() == node_name(operation)
    assert node.next_functions == ((middle.grad_fn, 0),)
    assert node._sequence_nr() > middle.grad_fn._sequence_nr()
    (metadata,) = node._input_metadata
    assert (list(metadata.shape), metadata.dtype, metadata.device) == ([5, 7], middle.dtype, middle.device)
    node.metadata["mine"] = 3
    assert node.metadata == {"mine": 3}


def test_node_hook_removed(operation, device):
    output = operation.function(leaf(9, device=device))
    seen = []
    handles = [output.grad_fn.register_hook(lambda *_: seen.append("removed"))]
    handles.append(output.grad_fn.register_prehook(lambda *_: seen.append("removed")))
    output.grad_fn.register_hook(lambda *_: seen.append("stays"))
    for handle in handles:
        handle.remove()
    output.sum().backward()
    assert seen == ["stays"]


@pytest.mark.in_place
def test_in_place_on_a_view_has_torchs_nodes(operation, device):
    def names(relu_):
        output = leaf(5, 7, device=device) * 1
        view = relu_(output[1:])
        return [node.name() for node in (output.grad_fn, view.grad_fn, output.grad_fn.next_functions[0][0])]

    assert names(operation.function_) == names(operation.definition_)


def test_gradient_edges(operation, device):
    """The gradient that arrives at our node, and the one that it gives, without the tensors."""

    def run(relu):
        middle = leaf(5, 7, device=device) * 1
        edge = torch.autograd.graph.get_gradient_edge(middle)
        output = relu(middle)
        edges = edge, torch.autograd.graph.get_gradient_edge(output)
        return torch.autograd.grad(output * 2, edges, numbers(5, 7, device=device, seed=1))

    assert_all_same(run(operation.function), run(operation.definition))


def test_multi_grad_hook(operation, device):
    seen = []
    outputs = [operation.function(leaf(3, device=device)), operation.function(leaf(3, device=device) * 2)]
    torch.autograd.graph.register_multi_grad_hook(outputs, seen.append)
    sum(outputs).sum().backward()
    assert len(seen) == 1 and all(torch.equal(grad, torch.ones(3, device=device)) for grad in seen[0])


def test_backward_once_too_often(operation, device):
    def error(relu):
        output = relu(leaf(9, device=device))
        output.sum().backward(retain_graph=True)
        output.sum().backward()
        return error_of(output.sum().backward)

    for ours, theirs in ((operation.function, operation.definition), in_place(operation)):
        assert error(ours) == error(theirs)


def test_retained_graph(operation, device):
    def run(relu):
        output = relu(input := leaf(5, 7, device=device))
        for seed in range(3):
            output.backward(numbers(5, 7, device=device, seed=seed).nan_to_num(0, 1, 1), retain_graph=True)
        return input.grad

    assert_same(run(operation.function), run(operation.definition))


@over_forms
def test_graph_is_freed(operation, device, form, no_garbage_collection):
    function, _ = form(operation)
    for with_backward in (False, True):
        input = leaf(5, 7, device=device)
        output = function(input)
        if with_backward:
            output.sum().backward()
        references = [weakref.ref(tensor) for tensor in (input, output)]
        del input, output
        assert [reference() for reference in references] == [None, None]


@pytest.mark.keeps_bits
def test_input_is_not_kept_alive(operation, device, no_garbage_collection):
    for function in (operation.function, in_place(operation)[0]):
        middle = leaf(9, device=device) * 1
        reference = weakref.ref(middle)
        output = function(middle)
        del middle
        assert reference() is None
        output.sum().backward()


# Profiler


def events(function, **options):
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, **options) as profiler:
        function()
    return {event.name: event for event in profiler.events()}


def test_profiler_shows_a_call(operation, device):
    for input in (numbers(3, 5, device=device), leaf(3, 5, device=device)):
        seen = events(lambda input=input: operation.function(input))
        assert seen["relu_ext::" + operation.name].input_shapes == [[3, 5]]


@pytest.mark.in_place
def test_profiler_shows_a_call_in_place(operation, device):
    for input in (numbers(3, 5, device=device), leaf(3, 5, device=device) * 1):
        seen = events(lambda input=input: operation.function_(input))
        assert seen[f"relu_ext::{operation.name}_"].input_shapes == [[3, 5]]


def test_profiler_shows_backward(operation, device):
    seen = events(lambda: operation.function(leaf(3, 5, device=device)).sum().backward())
    forward, backward = seen["relu_ext::" + operation.name], seen[node_name(operation)]
    assert seen[f"relu_ext::{operation.name}_backward"].input_shapes == [[3, 5], [2] if operation.keep else [3, 5]]
    assert seen[f"relu_ext::{operation.name}_backward"].cpu_parent.name == node_name(operation)
    assert forward.sequence_nr == backward.sequence_nr >= 0  # by which the profiler draws the arrow between them


@pytest.mark.in_place
def test_profiler_pairs_in_place_with_its_backward(operation, device):
    input = leaf(3, 5, device=device)
    seen = events(lambda: operation.function_(input * 1).sum().backward())
    assert seen[f"relu_ext::{operation.name}_"].sequence_nr == seen[node_name(operation)].sequence_nr


def test_profiler_with_all_options(operation, device, tmp_path):
    def step():
        return torch.nn.Sequential(torch.nn.Linear(5, 7), operation.module()).to(device)(
            torch.ones(3, 5, device=device)
        )

    with profile(record_shapes=True, with_stack=True, with_flops=True, with_modules=True, profile_memory=True) as p:
        step().sum().backward()
    p.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = (tmp_path / "trace.json").read_text()
    assert f'"relu_ext::{operation.name}"' in trace and node_name(operation) in trace
    assert "relu_ext::" + operation.name in [average.key for average in p.key_averages(group_by_input_shape=True)]


# Anomaly mode


@pytest.mark.keeps_bits
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_anomaly_mode(operation, device):
    input = numbers(5, 7, device=device).nan_to_num()
    with torch.autograd.set_detect_anomaly(True):
        output = operation.function(input.requires_grad_())
        output.sum().backward()
    assert_same(input.grad, operation.masked(torch.ones_like(input), operation.keep(input)).detach())


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_anomaly_mode_names_the_culprit(operation, device):
    """The node whose gradient is NaN, and in a warning the line of its forward, which is in this file."""
    with torch.autograd.detect_anomaly():
        output = operation.function(torch.full((3,), 0.5, device=device, requires_grad=True))
        message = rf"Function '{node_name(operation)}' returned nan values in its 0th output"
        with pytest.warns(UserWarning, match=__name__), pytest.raises(RuntimeError, match=message):
            output.backward(torch.full((3,), torch.nan, device=device))


# Threads


def in_threads(count, function):
    """function(index) in threads that start together; their results."""
    results, barrier = [None] * count, threading.Barrier(count)

    def run(index):
        barrier.wait()
        try:
            results[index] = function(index)
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("count", [64, 100_000])
def test_threads_with_graphs_of_their_own(operation, device, count):
    """Large inputs release the interpreter lock, small ones do not."""

    def run(function, index):
        for _ in range(20):
            results = output_and_gradient(function, numbers(count, device=device, seed=index))
        return results

    ours = in_threads(6, lambda index: run(operation.function, index))
    for index, results in enumerate(ours):
        assert_all_same(results, output_and_gradient(operation.definition, numbers(count, device=device, seed=index)))


@pytest.mark.parametrize("count", [64, 100_000])
def test_threads_that_share_a_graph(operation, device, count):
    input = leaf(count, device=device)
    output = operation.function(input)
    grads = [numbers(count, device=device, seed=index) for index in range(6)]

    def run(index):
        return [torch.autograd.grad(output, input, grads[index], retain_graph=True)[0] for _ in range(20)][-1]

    expected = operation.definition(input)
    for grad, result in zip(grads, in_threads(6, run), strict=True):
        assert_same(result, torch.autograd.grad(expected, input, grad, retain_graph=True)[0])


def test_threads_inherit_no_modes(operation, device):
    """A mode belongs to its thread; what runs in another takes the kernels there."""
    with Watch(), torch.no_grad():
        (output,) = in_threads(1, lambda _: operation.function(leaf(9, device=device)))
    assert output.grad_fn.name() == node_name(operation)


@pytest.mark.in_place
def test_threads_in_place_on_one_base(operation, device):
    """Rows of one tensor that needs no gradient, as a data loader's workers fill them."""
    base = numbers(6, 50_000, device=device)
    expected = operation.definition(base)
    in_threads(6, lambda index: operation.function_(base[index]))
    assert_same(base, expected)
