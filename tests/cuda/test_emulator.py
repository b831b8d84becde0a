"""The emulator itself: it runs what a GPU runs, and stops where a GPU would go wrong."""

import os
import subprocess

import pytest
from kernels import BUILT, HERE, VARIANTS, build

THREADS = 256
INVALID_VALUE, INVALID_CONFIGURATION = 1, 9  # cudaError_t


@pytest.fixture(scope="module", params=VARIANTS)
def run(request):
    """Runs one of cases.cpp's kernels; returns the process."""
    program = build([HERE / "emulator" / "cases.cpp"], BUILT / f"cases-{request.param}", VARIANTS[request.param])

    def run(kernel, *sizes, order=0):
        environment = {**os.environ, "EMULATOR_ORDER": str(order)}
        return subprocess.run([program, kernel, *map(str, sizes)], env=environment, capture_output=True, text=True)

    return run


def result(error, launches, total=0):
    return f"error {error}, total {total}, launches {launches}\n"


@pytest.mark.parametrize("order", range(8))
def test_barriers_shuffles_and_shared_memory(run, order):
    assert run("sum", order=order).stdout == result(0, 1, sum(range(THREADS)))


def test_a_missing_barrier_shows_in_some_order(run):
    totals = {run("sum_without_barrier", order=order).stdout for order in (0, 1, 7)}
    assert len(totals) > 1


@pytest.mark.parametrize(
    "kernel, message",
    [
        ("barrier_in_a_branch", "a barrier that not every thread of the block reached"),
        ("two_barriers", "a barrier that not every thread of the block reached"),
        ("shuffle_in_a_branch", "an exchange that not every lane of the mask reached"),
        ("two_shuffles", "lanes of one warp in different exchanges"),
        ("lane_outside_of_the_mask", "a value from a lane outside of the mask"),
        ("misaligned_load", "misaligned"),
        ("misaligned_streaming_load", "misaligned"),
        ("misaligned_store", "misaligned"),
    ],
)
def test_what_a_gpu_does_not_define_ends_the_run(run, kernel, message):
    process = run(kernel)
    assert process.returncode and message in process.stderr


@pytest.mark.parametrize(
    "sizes, error",
    [
        ((1, 1, 1, 16, 16, 1, 48 * 1024), 0),
        ((0, 1, 1, THREADS, 1, 1, 0), INVALID_CONFIGURATION),
        ((1, 65536, 1, THREADS, 1, 1, 0), INVALID_CONFIGURATION),
        ((1, 1, 65536, THREADS, 1, 1, 0), INVALID_CONFIGURATION),
        ((2**31, 1, 1, THREADS, 1, 1, 0), INVALID_CONFIGURATION),
        ((1, 1, 1, 0, 1, 1, 0), INVALID_CONFIGURATION),
        ((1, 1, 1, 1025, 1, 1, 0), INVALID_CONFIGURATION),
        ((1, 1, 1, 1, 1, 65, 0), INVALID_CONFIGURATION),
        ((1, 1, 1, THREADS, 1, 1, 48 * 1024 + 1), INVALID_VALUE),
    ],
)
def test_launch_limits(run, sizes, error):
    assert run("nothing", *sizes).stdout == result(error, int(error == 0))
