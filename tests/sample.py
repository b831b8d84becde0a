"""pytest plugin: --one-in N runs one test in N or so, those of all parameters, the same each time.

`pytest -p sample --one-in N` with this folder in PYTHONPATH.
"""

import zlib


def pytest_addoption(parser):
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="run one test in N or so; default: all")


def pytest_collection_modifyitems(config, items):
    number = config.getoption("--one-in")
    left_out = [item for item in items if zlib.crc32(item.nodeid.encode()) % number]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % number == 0]
