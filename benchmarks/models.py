"""Measures whole models of transformers as they come, converted, and converted and fused; prints a table, writes JSON.

Built from their configurations with random weights. A step is a forward and a backward in training mode.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing here is downloaded

import harness
import machine
import report
import torch
import transformers
from harness import Call
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.models.rt_detr.modeling_rt_detr import RTDetrConvEncoder

import relu_ext

RESULTS = Path(__file__).parent / "results" / "latest-models.json"
STOCK, CONVERTED, FUSED = "torch", "convert", "convert + fuse"
VARIANTS = (STOCK, CONVERTED, FUSED)
VOCABULARY = 1024
# For numbers that are not the same. In larger batches an element whose sign rounding decides often outweighs all else;
# so these say nothing of how often that happens with either model.
BATCHES, FEW = 9, (1, 160)
Record = dict[str, Any]
Inputs = dict[str, Tensor]


def tokens(rows: int, length: int, seed: int) -> Inputs:
    return {"input_ids": torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))}


def tokens_twice(rows: int, length: int, seed: int) -> Inputs:
    found = tokens(rows, length, seed)
    return {**found, "decoder_input_ids": found["input_ids"]}


def images(count: int, side: int, seed: int) -> Inputs:
    return {"pixel_values": torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))}


def masked_images(count: int, side: int, seed: int) -> Inputs:
    return {**images(count, side, seed), "pixel_mask": torch.ones(count, side, side)}


def rt_detr_backbone(**sizes: Any) -> nn.Module:
    """Its batch norms are frozen, with numbers like those of training: as they begin they would change nothing."""
    backbone = transformers.RTDetrResNetConfig(out_features=["stage2", "stage3", "stage4"], **sizes)
    model = RTDetrConvEncoder(transformers.RTDetrConfig(backbone_config=backbone, freeze_backbone_batch_norms=True))
    for name, buffer in model.named_buffers():
        of_scale = name.endswith(("weight", "running_var"))
        nn.init.uniform_(buffer, 0.5, 1.5) if of_scale else nn.init.normal_(buffer, std=0.1)
    return model


def from_config(model: type[nn.Module], config: Callable[..., Any]) -> Callable[..., nn.Module]:
    return lambda **sizes: model(config(**sizes))


@dataclass(frozen=True, eq=False)
class Model:
    name: str
    what: str
    build: Callable[..., nn.Module]
    sizes: dict[str, Any]
    inputs: Callable[[int, int, int], Inputs]
    batch: tuple[int, int]  # what `inputs` takes, before a seed
    tiny: dict[str, Any]  # sizes for the tests
    dropout: bool = False

    def built(self, tiny: bool = False) -> nn.Module:
        torch.manual_seed(0)
        return self.build(**(self.sizes | self.tiny if tiny else self.sizes))

    def example(self, tiny: bool = False, seed: int = 0) -> Inputs:
        return self.inputs(*(TINY_BATCH if tiny else self.batch), seed)


TINY_BATCH = (2, 64)
TEXT = {"vocab_size": VOCABULARY, "use_cache": False}
RESNET_18 = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
TINY_STAGES = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 2, 1, 1]}
MODELS = (
    Model(
        name="OPT",
        what="2 layers of OPT-125M (arXiv:2205.01068), 512 tokens",
        build=from_config(transformers.OPTModel, transformers.OPTConfig),
        sizes=TEXT | {"num_hidden_layers": 2, "max_position_embeddings": 256},  # the defaults are OPT-125M's
        inputs=tokens,
        batch=(4, 128),
        tiny={"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 2},
        dropout=True,
    ),
    Model(
        name="T5",
        what="2 + 2 layers of T5-small (arXiv:1910.10683), 512 tokens each",
        build=from_config(transformers.T5Model, transformers.T5Config),
        sizes=TEXT | {"num_layers": 2},  # the defaults are T5-small's
        inputs=tokens_twice,
        batch=(4, 128),
        tiny={"d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2},
        dropout=True,
    ),
    Model(
        name="Nemotron",
        what="squared ReLU (arXiv:2402.16819), 2 layers of the width of OPT-125M, 512 tokens",
        build=from_config(transformers.NemotronModel, transformers.NemotronConfig),
        sizes=TEXT
        | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 2, "max_position_embeddings": 256}
        | {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64},
        inputs=tokens,
        batch=(4, 128),
        tiny={"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
        | {"head_dim": 16},
    ),
    Model(
        name="ResNet",
        what="ResNet-18 (arXiv:1512.03385), 4 images of 224 x 224",
        build=from_config(transformers.ResNetModel, transformers.ResNetConfig),
        sizes=RESNET_18,
        inputs=images,
        batch=(4, 224),
        tiny=TINY_STAGES,
    ),
    Model(
        name="RegNet",
        what="RegNetY-400MF (arXiv:2003.13678), 8 images of 224 x 224",
        build=from_config(transformers.RegNetModel, transformers.RegNetConfig),
        sizes={"hidden_sizes": [48, 104, 208, 440], "depths": [1, 3, 6, 6], "groups_width": 8, "layer_type": "y"},
        inputs=images,
        batch=(8, 224),
        tiny=TINY_STAGES,
    ),
    Model(
        name="MobileNetV2",
        what="MobileNetV2 1.0 (arXiv:1801.04381), 8 images of 224 x 224",
        build=from_config(transformers.MobileNetV2Model, transformers.MobileNetV2Config),
        sizes={},
        inputs=images,
        batch=(8, 224),
        tiny={"depth_multiplier": 0.25},
    ),
    Model(
        name="RT-DETR backbone",
        what="ResNet-18-vd with frozen batch norms (arXiv:2304.08069), 2 images of 320 x 320",
        build=rt_detr_backbone,
        sizes=RESNET_18,
        inputs=masked_images,
        batch=(2, 320),
        tiny=TINY_STAGES,
    ),
)


def variants(model: nn.Module, inputs: Inputs) -> tuple[dict[str, nn.Module], Record]:
    """The model as it is, and copies that are converted and fused; what the two did."""
    converted, fused = copy.deepcopy(model), copy.deepcopy(model)
    relu_ext.convert(fused)
    reports = {"convert": relu_ext.convert(converted), "fuse": relu_ext.fuse(fused, inputs)}
    done = {name: {"replaced": dict(found), "left_alone": found.left_alone} for name, found in reports.items()}
    return dict(zip(VARIANTS, (model, converted, fused), strict=True)), done


# A step


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All that has a gradient."""
    found = tree_leaves(model(**inputs))
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.requires_grad]


def incoming(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Gradients of the outputs."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(output.shape, generator=generator) for output in outputs(model, inputs)]


def step(model: nn.Module, inputs: Inputs, grads: list[Tensor]) -> list[Tensor]:
    model.zero_grad()
    found = outputs(model, inputs)
    torch.autograd.backward(found, grads)
    return found


# Numbers


Results = tuple[list[Tensor], list[Tensor]]  # outputs, gradients of the parameters


def results(model: nn.Module, inputs: Inputs, grads: list[Tensor]) -> Results:
    found = [output.detach() for output in step(model, inputs, grads)]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found, gradients


def identical(ours: Results, theirs: Results) -> bool:
    return all(torch.equal(a, b) for pairs in map(zip, ours, theirs) for a, b in pairs)


def same_numbers(row: Model, models: dict[str, nn.Module], tiny: bool) -> dict[str, bool]:
    """Whether outputs and gradients are torch's.

    In training mode; models with dropout in eval mode, since a fused one draws other numbers.
    """
    for model in models.values():
        model.train(not row.dropout)
    inputs = row.example(tiny)
    grads = incoming(models[STOCK], inputs)
    expected = results(models[STOCK], inputs, grads)
    return {name: identical(results(models[name], inputs, grads), expected) for name in VARIANTS[1:]}


# Memory


def kept_bytes(model: nn.Module, inputs: Inputs) -> int:
    """Of what is kept for the backward of a step, without parameters, buffers and inputs."""
    model.train()
    with harness.kept_storages([*model.parameters(), *model.buffers(), *inputs.values()]) as storages:
        model(**inputs)
    return sum(storages.values())


def bits_bytes(converted: nn.Module, inputs: Inputs) -> int:
    """One bit for each element that an activation makes, in bytes for each call."""
    counts = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        counts.append(-(-output.numel() // 8))

    ours = [module for module in converted.modules() if type(module).__module__.startswith("relu_ext")]
    hooks = [module.register_forward_hook(note) for module in ours]
    with torch.no_grad():
        converted(**inputs)
    for hook in hooks:
        hook.remove()
    return sum(counts)


# Records and the table


def record(row: Model, options: argparse.Namespace) -> Record:
    model, inputs = row.built(options.tiny), row.example(options.tiny)
    models, done = variants(model, inputs)
    found = {
        "section": "models",
        "model": row.name,
        "what": row.what,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "identical": same_numbers(row, models, options.tiny),
        "kept_bytes": {name: kept_bytes(variant, inputs) for name, variant in models.items()},
        "bits_bytes": bits_bytes(models[CONVERTED], inputs),
        **done,
    }
    grads = incoming(model.train(), inputs)
    calls = {name: Call(step, (variant.train(), inputs, grads)) for name, variant in models.items()}
    samples = harness.measure(calls, options.seconds, partial(harness.wall_clock, threads=options.threads))
    return found | {
        "rounds": len(samples[STOCK]),
        "seconds": {name: harness.spread(times) for name, times in samples.items()},
        "ratio": {name: harness.quotients(samples, name, STOCK) for name in VARIANTS[1:]},
    }


def ratio_text(ratio: harness.Spread) -> str:
    text = f"{ratio['median']:.2f} ({ratio['q20']:.2f} to {ratio['q80']:.2f})"
    return report.coloured(ratio["median"], text)


def cells(found: Record) -> list[str]:
    kept = found["kept_bytes"]
    shares = [kept[name] / kept[STOCK] for name in VARIANTS[1:]]
    return [
        found["model"],
        *("identical" if found["identical"][name] else "[red]not identical[/]" for name in VARIANTS[1:]),
        f"{kept[STOCK] / 2**20:.1f} MiB",
        *(report.coloured(share, f"{share:.3f}") for share in shares),
        report.duration(found["seconds"][STOCK]["median"]),
        *(ratio_text(found["ratio"][name]) for name in VARIANTS[1:]),
    ]


def table(records: list[Record]) -> Table:
    models = " ".join(f"{each['model']}: {each['what']}." for each in records)
    found = Table(
        title="Models of transformers",
        caption="numbers: outputs and gradients in float32 against torch's, bit for bit. kept: for the backward of a "
        "step, every storage once, without parameters and inputs. step: forward and backward. Both over torch's, time "
        f"in the same round: median (20 % to 80 %); below 1 relu_ext is better. {models}",
    )
    for heading in ("model", "numbers, convert", "and fuse"):
        found.add_column(heading)
    for heading in ("kept, torch", "convert", "and fuse", "step, torch", "convert", "and fuse"):
        found.add_column(heading, justify="right")
    for each in records:
        found.add_row(*cells(each))
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [model.name for model in MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=15, help="on a model's steps, or nine rounds; default: %(default)s"
    )
    parser.add_argument("--tiny", action="store_true", help="the tests' sizes: a smoke test")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", type=Path, default=RESULTS, help="default: %(default)s")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    machine.restart_with_steady_malloc()
    torch.set_num_threads(options.threads)
    start, others = time.perf_counter(), machine.OtherLoad()
    chosen = [model for model in MODELS if model.name in options.models]
    progress = Console(stderr=True)
    records = [record(row, options) for row in track(chosen, "models", console=progress, transient=True)]
    about = machine.describe(torch.device("cpu"), options.threads)
    about["versions"]["transformers"] = transformers.__version__
    about |= {"seconds": time.perf_counter() - start, "other_processes": others.share()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({**about, "records": records}, indent=1) + "\n")
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    console.print(report.markdown(table(records)) if options.markdown else table(records))
    console.print(f"{machine.summary(about)}\n{about['seconds']:.0f} s; written to {options.json}", soft_wrap=True)


if __name__ == "__main__":
    main()
