"""Which channels of a model's activations are dead, watched while it trains.

The bits that an activation keeps for backward say what fired. They are counted by channel on the device, beside the
training step; nothing is copied to the host before somebody asks.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from . import _C, modules

POSITIVE_OUTPUT = (
    nn.ReLU,
    modules.AddReLU,
    modules.BiasReLU,
    modules.FrozenBatchNormReLU2d,
    modules.LinearReLU,
    modules.ReLUDropout,
)
POSITIVE_INPUT = (nn.CELU, nn.ELU, nn.LeakyReLU, nn.PReLU, nn.SELU, modules.ReLUSquared)
FAMILY = (*POSITIVE_OUTPUT, *POSITIVE_INPUT, nn.Hardtanh, nn.Threshold, modules.ReGLU)

NOT_CALLED = "not called in training mode; what torch.compile compiles is not counted"
NO_BITS = "no bits at hand: made again from output or input"
NOT_TOLD = "neither bits nor output and input tell what fired"
MOST_NAMED = 8  # channels in a line of the report

# Forward passes may be in several threads: nn.DataParallel's are. One for all monitors, so that these can be copied.
_adding_up = threading.RLock()


def _bits_again(module: nn.Module, input: Any, output: Tensor) -> tuple[str, tuple[float, ...], Tensor] | None:
    """An operation that keeps bits, its scalars, and an input for which its bits are those of this module's call.

    None where there is none: an activation in place has overwritten its input.
    """
    if isinstance(module, POSITIVE_OUTPUT):
        return "relu", (), output
    if isinstance(module, nn.ReLU6):
        return "hardtanh", (0, 6), output
    if not isinstance(module, FAMILY) or not isinstance(input, Tensor) or getattr(module, "inplace", False):
        return None
    if isinstance(module, nn.Hardtanh):
        return "hardtanh", (module.min_val, module.max_val), input
    if isinstance(module, nn.Threshold):
        return "threshold", (module.threshold, 0), input
    if isinstance(module, modules.ReGLU):
        return "relu", (), input.chunk(2, module.dim)[0]
    return "leaky_relu", (0,), input


class _Cells:
    """What one call of a layer has added up, on the device of its output."""

    def __init__(self, output: Tensor, channels: int) -> None:
        self.kept, self.earlier, self.last = (_C.cells(output, channels) for _ in range(3))
        self.nonfinite, self.nonfinite_gradient = _C.cells(output, 1), _C.cells(output, 1)
        # Elements of a channel that were looked at, in this window and the one before; the last step that was.
        self.elements = self.earlier_elements = self.step = 0

    def next_window(self) -> None:
        self.kept, self.earlier = _C.cells(self.kept, len(self.kept)), self.kept
        self.elements, self.earlier_elements = 0, self.elements

    def count(self, module: nn.Module, input: Any, output: Tensor, dim: int, step: int) -> str | None:
        """Adds one output up. What there is to say about it: None where its node has the bits."""
        note = None
        if not _C.count_bits(output, dim, step, self.kept, self.last):
            again = _bits_again(module, input, output)
            if not again or again[-1].shape != output.shape or not _C.is_observable(again[-1]):
                return NOT_TOLD
            if not _C.count_bits_of(*again, dim, step, self.kept, self.last):
                return f"no kernels for {output.dtype} on {output.device.type}: not counted"
            note = NO_BITS
        self.elements += output.numel() // len(self.kept)
        self.step = step
        return note


def _needs(package: str) -> ImportError:
    return ImportError(f"relu_ext.Monitor needs {package} for this: pip install relu_ext[bench]")


class _Layer:
    """A module that is watched, and what its calls have added up."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.kind = name, type(module).__name__
        self.forget()

    def forget(self) -> None:
        self.cells: dict[tuple[int, torch.device], _Cells] = {}
        self.notes: dict[str, None] = {}  # in order, each once
        self.calls = self.calls_in = 0

    def next_call(self, step: int) -> int:
        """Its number in this step, from 0."""
        if self.calls_in != step:
            self.calls, self.calls_in = 0, step
        self.calls += 1
        return self.calls - 1


def _ignore(*_: Any) -> None:
    pass


def _no_hook() -> Callable:
    return _ignore


class _Hook:
    """A method of a monitor, as a hook. In a copy of the model, pickled or deep, it does nothing."""

    def __init__(self, method: Callable, *arguments: Any) -> None:
        self.method, self.arguments = method, arguments

    def __call__(self, *given: Any) -> None:
        if not torch.compiler.is_compiling():
            self.method(*self.arguments, *given)

    def __reduce__(self) -> tuple:
        return _no_hook, ()


@dataclass(frozen=True)
class LayerReport:
    """What one row of a report says. Channels are those of the dimension that the monitor looks at.

    name: as ``named_modules()`` has it; ``name:2`` is the second call of a module within a step.
    kind: the module's class.
    channels: how many there are; 0 where nothing was counted.
    inactive: the fraction of all elements that were inactive.
    inactive_by_channel: float64, ``[channels]``, on the CPU: the fraction of a channel's elements that were inactive.
    dead: int64, on the CPU: the channels that never fired in the last ``window`` steps.
    nonfinite, nonfinite_gradient: the first step in which the output, or the gradient that arrived at it, had an
        infinity or NaN; None: there was none.
    note: what was left out, and why.
    """

    name: str
    kind: str
    inactive_by_channel: Tensor
    dead: Tensor
    nonfinite: int | None = None
    nonfinite_gradient: int | None = None
    note: str = ""

    @property
    def channels(self) -> int:
        return len(self.inactive_by_channel)

    @property
    def inactive(self) -> float | None:
        return self.inactive_by_channel.mean().item() if self.channels else None


class Monitor:
    """Watches the activations of a model while it trains: how many elements are inactive, which channels are dead, and
    when a number stopped being finite.

    >>> monitor = relu_ext.Monitor(model)
    >>> ...  # train
    >>> monitor.report()

    Args:
        model: its modules of the ReLU family are watched, torch's own and relu_ext's.
        also: further modules by name, patterns as of :mod:`fnmatch`: those whose output comes from a relu_ext function
            that keeps bits.
        window: the number N of steps in "dead for N steps". Fractions are those of this window and the one before, that
            is of the last N to 2 N steps.
        dim: the dimension of the channels. None: the last of a tensor of three dimensions, ``[batch, time, channels]``,
            else the second, ``[batch, channels, ...]``, or the only one.
        every: look at each so-many-th step only.
        calls: of a module that is called several times a step, so many calls have a row of their own; later ones are
            added to the last of these.

    An element is inactive where its bit is 0: the output of a ``relu`` is 0 there, that of ``hardtanh`` is at a bound,
    that of ``leaky_relu`` and the ``elu`` family is on the side that is not positive, and ``relu_dropout`` has dropped
    it or had nothing to drop. A channel fires in a step if one of its elements is not inactive. NaN counts as ATen's
    gradient treats it.

    A step is a call of ``model`` in training mode, a micro-batch where gradients are accumulated. Where only parts of
    the model are called, :meth:`step` begins one. What runs in eval mode is not counted. Of a checkpoint the first
    forward is counted, the repeated one is not.

    Bits are counted where the output's node has them at hand. Otherwise (modules of torch, activations that keep no
    bits, checkpoints and offloading, no_grad) a kernel makes them again from output or input, in about the time of a
    ``relu``. What allows neither is left out, and the report says so: outputs that are no plain tensors of a dtype and
    device with kernels, activations in place without bits, a number of channels that changes, torch.compile (the hooks
    vanish from what it compiles; they break no graph) and calls that a CUDA graph captures.

    Everything is added up on the device of the output, without waiting for it. In a distributed run each process
    watches its own part; of ``nn.DataParallel``, watch the wrapper. Copies of the model, pickled or deep, are not
    watched. The model holds the hooks until :meth:`close`, or the end of a ``with`` block.

    Raises:
        ValueError: nothing to watch, or window, every or calls below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        also: str | Iterable[str] = (),
        *,
        window: int = 100,
        dim: int | None = None,
        every: int = 1,
        calls: int = 8,
    ) -> None:
        if min(window, every, calls) < 1:
            raise ValueError(f"window, every and calls have to be at least 1, got {window}, {every} and {calls}")
        self.window, self.dim, self.every, self.calls = window, dim, every, calls
        patterns = (also,) if isinstance(also, str) else tuple(also)
        watched = [
            (_Layer(name, module), module)
            for name, module in model.named_modules()
            if isinstance(module, FAMILY) or any(fnmatchcase(name, pattern) for pattern in patterns)
        ]
        if not watched:
            raise ValueError(
                f"{type(model).__name__} has no activation of the ReLU family, and no module of {patterns}"
            )
        self.steps = 0
        self._layers = [layer for layer, _ in watched]
        self._handles = [module.register_forward_hook(_Hook(self._look, layer)) for layer, module in watched]
        self._handles.append(model.register_forward_pre_hook(_Hook(self._begin), prepend=True))

    def step(self) -> None:
        """Begins a step. A call of the model in training mode does it, too."""
        with _adding_up:
            self.steps += 1
            if self.steps > 1 and self.steps % self.window == 1 % self.window:
                for layer in self._layers:
                    for cells in layer.cells.values():
                        cells.next_window()

    def reset(self) -> None:
        """Forgets all that was counted; the next step is the first."""
        with _adding_up:
            self.steps = 0
            for layer in self._layers:
                layer.forget()

    def close(self) -> None:
        """Takes the hooks off the model. What was counted stays."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _begin(self, model: nn.Module, _args: tuple) -> None:
        if model.training and not _C.in_backward():
            self.step()

    def _look(self, layer: _Layer, module: nn.Module, args: tuple, output: Any) -> None:
        if module.training:
            with _adding_up:
                self._add_up(layer, module, args, output)

    def _add_up(self, layer: _Layer, module: nn.Module, args: tuple, output: Any) -> None:
        if not self.steps:
            self.step()
        if self.steps % self.every:
            return
        if note := self._unfit(output):
            layer.notes[note] = None
            return
        dim, repeated = self._dim(output), _C.in_backward()
        # What a checkpoint repeats comes in another order: its gradients are all noted beside the first call.
        call = 0 if repeated else min(layer.next_call(self.steps), self.calls - 1)
        cells = layer.cells.get((call, output.device))
        if not cells:
            cells = layer.cells[call, output.device] = _Cells(output, output.shape[dim])
        if len(cells.kept) != output.shape[dim]:
            layer.notes[f"had {len(cells.kept)} channels, then {output.shape[dim]}, which are not counted"] = None
            return
        _C.watch_gradient(output, self.steps, cells.nonfinite_gradient)
        if repeated:
            return
        if note := cells.count(module, args[0] if args else None, output, dim, self.steps):
            layer.notes[note] = None
        _C.find_nonfinite(output, self.steps, cells.nonfinite)

    def _dim(self, output: Tensor) -> int:
        dim = self.dim
        if dim is None:
            dim = 2 if output.dim() == 3 else min(1, output.dim() - 1)
        return dim % output.dim()

    def _unfit(self, output: Any) -> str | None:
        """Why this output cannot be counted."""
        if type(output) is not Tensor:
            return f"an output is a {type(output).__name__}, which is not counted"
        if not _C.is_observable(output):
            return "an output is traced or transformed, which is not counted"
        if not output.numel() or not output.dim():
            return "an output without elements or dimensions is not counted"
        if self.dim is not None and not -output.dim() <= self.dim < output.dim():
            return f"an output of {output.dim()} dimensions has no dimension {self.dim}"
        if output.is_cuda and torch.cuda.is_current_stream_capturing():
            return "what a CUDA graph captures is not counted"
        return None

    def layers(self) -> list[LayerReport]:
        """A row for each module that is watched, or for each of its calls; this and all below wait for the device."""
        with _adding_up:
            return [row for layer in self._layers for row in self._rows(layer)]

    def _rows(self, layer: _Layer) -> list[LayerReport]:
        note = "; ".join(layer.notes)
        calls = sorted({call for call, _ in layer.cells})
        if not calls:
            return [LayerReport(layer.name, layer.kind, *_no_channels(), note=note or NOT_CALLED)]
        return [self._row(layer, call, note) for call in calls]

    def _row(self, layer: _Layer, call: int, note: str) -> LayerReport:
        """Of all devices together, where the model was moved or is replicated."""
        all_cells = [cells for (own, _), cells in layer.cells.items() if own == call]
        kept = sum((cells.kept + cells.earlier).cpu() for cells in all_cells)
        elements = sum(cells.elements + cells.earlier_elements for cells in all_cells)
        last = torch.stack([cells.last.cpu() for cells in all_cells]).amax(0)
        since = max(0, max(cells.step for cells in all_cells) - self.window)
        first = [_first(cells.nonfinite for cells in all_cells)]
        first.append(_first(cells.nonfinite_gradient for cells in all_cells))
        name = f"{layer.name}:{call + 1}" if call else layer.name
        if not elements:
            return LayerReport(name, layer.kind, *_no_channels(), *first, note=note)
        inactive = 1 - kept.double() / elements
        return LayerReport(name, layer.kind, inactive, (last <= since).nonzero().flatten(), *first, note)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The rows by name, in numbers, strings, lists and None, as loggers and :mod:`json` take them."""
        return {
            row.name: {
                "kind": row.kind,
                "channels": row.channels,
                "inactive": row.inactive,
                "dead": row.dead.tolist(),
                "nonfinite": row.nonfinite,
                "nonfinite_gradient": row.nonfinite_gradient,
                "note": row.note,
            }
            for row in self.layers()
        }

    def scalars(self) -> dict[str, float]:
        """Of each row ``NAME/inactive`` and ``NAME/dead``, the fraction of its channels, where anything was counted;
        ``NAME/nonfinite``, 1 where output or gradient ever was.

        For TensorBoard: ``for name, value in monitor.scalars().items(): writer.add_scalar(name, value, step)``.
        """
        found = {}
        for row in self.layers():
            if row.channels:
                found[f"{row.name}/inactive"] = row.inactive
                found[f"{row.name}/dead"] = len(row.dead) / row.channels
            found[f"{row.name}/nonfinite"] = float(bool(row.nonfinite or row.nonfinite_gradient))
        return found

    def report(self, console: Any = None) -> None:
        """Prints the rows as a table, to a :class:`rich.console.Console` or the terminal.

        Raises ImportError where rich is not installed.
        """
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError as error:
            raise _needs("rich") from error
        steps = f"{self.steps} steps" if self.steps < self.window else f"the last {self.window} of {self.steps} steps"
        table = Table(title=f"Activations, {steps}", caption="not finite: the first step in which a number was not")
        for heading in ("layer", "module", "channels", "inactive", "dead", "which", "not finite"):
            table.add_column(heading, justify="right" if heading in ("channels", "inactive", "dead") else "left")
        rows = self.layers()
        for row in rows:
            table.add_row(*_columns(row), style="bold red" if row.nonfinite or row.nonfinite_gradient else None)
        console = console or Console()
        console.print(table)
        for row in rows:
            if row.note:
                console.print(f"{row.name}: {row.note}", highlight=False)

    def plot(self, path: Any = None) -> Any:
        """Draws layers and channels as a picture: the brighter, the less active, with a red mark on what is dead.

        path: a file to write, of a format that matplotlib knows by its name. Returns the
        :class:`matplotlib.figure.Figure`. Raises ImportError where matplotlib is not installed, and RuntimeError where
        nothing was counted.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise _needs("matplotlib") from error
        rows = [row for row in self.layers() if row.channels]
        if not rows:
            raise RuntimeError("relu_ext.Monitor: nothing was counted, so there is nothing to draw")
        picture = torch.full((len(rows), max(row.channels for row in rows)), torch.nan, dtype=torch.float64)
        for line, row in zip(picture, rows, strict=True):
            line[: row.channels] = row.inactive_by_channel
        figure = Figure(figsize=(10, 1.2 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(picture.numpy(), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        figure.colorbar(image, label="inactive")
        dead = [(channel, line) for line, row in enumerate(rows) for channel in row.dead.tolist()]
        axes.scatter(*zip(*dead, strict=True) if dead else ([], []), marker="x", color="red", s=16)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.set_xlabel(f"channel; a cross: not one element in {self.window} steps")
        if path is not None:
            figure.savefig(path)
        return figure


def _first(steps: Iterable[Tensor]) -> int | None:
    return min((step for tensor in steps if (step := tensor.item())), default=None)


def _no_channels() -> tuple[Tensor, Tensor]:
    return torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.int64)


def _columns(row: LayerReport) -> list[str]:
    steps = ((row.nonfinite, "output"), (row.nonfinite_gradient, "gradient"))
    nonfinite = ", ".join(f"{name} {step}" for step, name in steps if step)
    if not row.channels:
        return [row.name, row.kind, "", "", "", "", nonfinite]
    which = " ".join(map(str, row.dead[:MOST_NAMED].tolist())) + (" ..." if len(row.dead) > MOST_NAMED else "")
    return [row.name, row.kind, str(row.channels), f"{row.inactive:.1%}", str(len(row.dead)), which, nonfinite]
