"""A model seen through a function of its outputs: to count, to record or to change them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torchdnr.decisions import class_scores, has_reject_column

Change = Callable[[Tensor, Tensor], Tensor]
"""``change(inputs, output)``: the output of the view, from that of the model."""


class ModelView(nn.Module):
    """A model whose outputs pass through a function, ``change(inputs, output) -> output``.

    Whatever else the model has can be reached through the view. Smoothed views of the model, if it
    has any (``model.smoothed(factor)``), pass through the same function. ``reject`` says whether
    the last column of what the view returns is the threshold; None: if it is for the model.
    """

    def __init__(
        self, model: Callable[[Tensor], Tensor], change: Change, reject: bool | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.change = change
        self.rejects = has_reject_column(model, reject)
        # A library that puts the view back into this mode leaves the model in its mode too.
        self.training = getattr(model, "training", False)

    @property
    def reject_index(self) -> int | None:
        """Column c of the threshold, None if there is none; -1, the last, where c is not known."""
        if not self.rejects:
            return None
        index = getattr(self.model, "reject_index", None)
        return -1 if index is None else index

    def forward(self, inputs: Tensor) -> Tensor:
        """Evaluate the model, and pass its output through the function."""
        return self.change(inputs, class_scores(self.model(inputs)))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the model has
        try:
            return super().__getattr__(name)  # parameters, buffers and submodules
        except AttributeError:
            submodules = self.__dict__.get("_modules", {})  # none yet while it is being copied
            if "model" not in submodules and "model" not in self.__dict__:
                raise
            value = getattr(self.model, name)
        if name == "smoothed" and not isinstance(value, nn.Module):
            return lambda *args, **options: ModelView(
                value(*args, **options), self.change, self.rejects
            )
        return value
