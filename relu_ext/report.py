"""What :func:`relu_ext.convert`, :func:`relu_ext.revert` and :func:`relu_ext.fuse` did to a model."""


class Report(dict[str, tuple[str, str]]):
    """What was replaced: the name of the place, as in ``named_modules()``, and what stands there, before and after.

    ``left_alone`` gives, for each place that looked like one but was left as it is, the reason. ``print`` shows both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left_alone: dict[str, str] = {}

    def __str__(self) -> str:
        width = max(map(len, [*self, *self.left_alone]), default=0)
        lines = [f"{len(self)} replaced, {len(self.left_alone)} left alone"]
        lines += [f"  {name:{width}}  {before} -> {after}" for name, (before, after) in self.items()]
        lines += [f"  {name:{width}}  left alone: {reason}" for name, reason in self.left_alone.items()]
        return "\n".join(lines)
