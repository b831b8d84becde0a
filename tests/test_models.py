"""Models of transformers, built small: converted and fused they compute what they did, and keep less or next to it.

What is measured, and at which sizes, is in benchmarks/models.py.
"""

import functools
import sys
from pathlib import Path

import pytest
import torch
from operations import assert_same

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("rich", reason="rich, with which benchmarks print, is not installed")
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import models
import report
from models import CONVERTED, FUSED, MODELS, STOCK, Model

ROWS = {row.name: row for row in MODELS}
KEEP_LESS = {"T5", "Nemotron", "MobileNetV2"}
FUSIONS = {
    "T5": {"relu_ext.relu_dropout"},
    "ResNet": {"relu_ext.add_relu", "relu_ext.fma_relu, in eval mode"},
    "RegNet": {"relu_ext.add_relu", "relu_ext.fma_relu, in eval mode"},
    "RT-DETR backbone": {"relu_ext.add_relu", "relu_ext.scale_shift_relu"},
}

over_models = pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
over_variants = pytest.mark.parametrize("variant", [CONVERTED, FUSED])


@functools.cache
def built(row: Model):
    """The variants, and what convert and fuse did."""
    return models.variants(row.built(tiny=True), row.example(tiny=True))


@over_models
def test_what_is_replaced(row):
    found, done = built(row)
    activations = [name for name, module in found[STOCK].named_modules() if "relu" in type(module).__name__.lower()]
    assert list(done["convert"]["replaced"]) == activations and not done["convert"]["left_alone"]
    assert {after for _, after in done["fuse"]["replaced"].values()} == FUSIONS.get(row.name, set())
    assert all(model.state_dict().keys() == found[STOCK].state_dict().keys() for model in found.values())


@over_models
@over_variants
def test_numbers(row, variant):
    """Torch's, bit for bit."""
    found, _ = built(row)
    for model in found.values():
        model.train(not row.dropout)
    for seed in range(2):
        inputs = row.example(tiny=True, seed=seed)
        grads = models.incoming(found[STOCK], inputs)
        ours, theirs = (models.results(found[name], inputs, grads) for name in (variant, STOCK))
        assert models.identical(ours, theirs)
        assert any(gradient.count_nonzero() for gradient in ours[1])


@over_models
@over_variants
def test_kept(row, variant):
    """At most a bit more for each element of an activation, 1/32 of it, and less where torch keeps what it need not."""
    (found, _), inputs = built(row), row.example(tiny=True)
    ours, theirs = (models.kept_bytes(found[name], inputs) for name in (variant, STOCK))
    assert ours <= theirs + models.bits_bytes(found[CONVERTED], inputs)
    assert ours < theirs or row.name not in KEEP_LESS


def test_dropout_of_a_converted_model_draws_the_same():
    row = ROWS["T5"]
    (found, _), inputs = built(row), row.example(tiny=True)
    results = []
    for name in (STOCK, CONVERTED):
        model = found[name].train()
        grads = models.incoming(model, inputs)
        torch.manual_seed(0)
        results.append(models.results(model, inputs, grads))
    for ours, theirs in zip(*results, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)


def test_record_and_table():
    options = models.parse(["--tiny", "--seconds", "0", "--threads", "1"])
    found = models.record(ROWS["RT-DETR backbone"], options)
    assert found["identical"] == {CONVERTED: True, FUSED: True}
    assert found["rounds"] >= 9
    (row,) = [line for line in report.markdown(models.table([found])).splitlines() if line.startswith("| RT-DETR")]
    assert "identical" in row and row.count("|") == 10
