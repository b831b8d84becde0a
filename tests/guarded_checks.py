"""Every call of the table on tensors between pages that trap: python guarded_checks.py behind|before

guards.cpp is preloaded. Inputs, gradients, outputs, bits and vectors end at such a page, or begin after one. Each call
is announced on stdout before it runs: of a process that traps the last line tells the place.
"""

import ctypes
import faulthandler
import sys

import torch
from calls import UNFROZEN
from operations import DTYPES
from torch import Tensor

import relu_ext
from relu_ext import _C

PAGE = 4096
PLACES = {"behind": 1, "before": 2}  # guards.cpp's
# Around vectors, words of bits, blocks and chunks of 512 and 1024 elements, and pages; the last is for two threads.
LENGTHS = [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 129, 511, 513, 1023, 1025, 4097, 22001]


def lies_at_guard(tensor: Tensor, place: str) -> bool:
    memory = tensor.untyped_storage()
    return (memory.data_ptr() + (memory.nbytes() if place == "behind" else 0)) % PAGE == 0


def main(place: str) -> None:
    faulthandler.enable()
    ctypes.c_int.in_dll(ctypes.CDLL(None), "guard_place").value = PLACES[place]
    count = 0
    for isa in relu_ext.build_info()["isas_supported"]:
        _C.set_isa(isa)
        for dtype in DTYPES:
            for n in LENGTHS:
                for name, call in UNFROZEN.items():
                    for shape in call.sizes(n):
                        count += check(place, isa, dtype, shape, name, call)
    print(f"{count} calls")


def check(place, isa, dtype, shape, name, call) -> int:
    def make(*own):
        return torch.full(own, 0.5, dtype=dtype)

    for choice in range(call.choices()):
        print(f"{name}, {shape} of {dtype}, {isa}, gradients {choice:b}", flush=True)
        for tensor in call.run(make, shape, choice):
            assert tensor is None or lies_at_guard(tensor, place)
    return call.choices()


if __name__ == "__main__":
    main(sys.argv[1])
