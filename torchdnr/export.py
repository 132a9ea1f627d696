"""A fitted classifier as one program that needs this package no more: `torch.export` and ONNX."""

import os
import re
import uuid
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from torchdnr.decisions import REJECT, evaluation_mode, predict_with_rejection
from torchdnr.files import atomic_path
from torchdnr.kernels.any_kernel import rbf_gamma
from torchdnr.svm.rbf_svm import RBFSVM

if TYPE_CHECKING:
    from onnx_ir import Model

INPUT = "images"
OUTPUTS = ("scores", "labels", "rejected")
BATCH_AXIS = "n"

ONNX_FILE_LIMIT = 2**31 - 2**24
"""Most bytes of weights in one ONNX file: protobuf ends at 2 GiB, and the graph needs some."""


class Decision(nn.Module):
    """What a program gives for images: the scores, and the decision that follows from them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Score images ``(n, ...)`` in [0, 1] and decide.

        Returns:
            ``scores (n, c)``, ``labels (n,)`` int64 with ``REJECT`` = -1, ``rejected (n,)`` bool.
            A program cannot raise: it rejects an image with a value outside [0, 1], or NaN, whose
            scores say nothing.
        """
        output = self.model(images)
        scores, threshold = output[:, :-1], output[:, -1]
        valid = ((images >= 0) & (images <= 1)).flatten(1).all(dim=1)
        labels = torch.where(valid, predict_with_rejection(scores, threshold), REJECT)
        return dict(zip(OUTPUTS, (scores, labels, labels == REJECT), strict=True))


def export_program(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """Export a fitted classifier with a reject option as a program for any number of images.

    ``program.module()(images)`` runs it; ``torch.export.save`` writes it to a ``.pt2`` file and
    ``torch.export.load`` reads that, without this package. Load only files that you trust: PyTorch
    unpickles parts of them. Distances keep full precision where the switch of PyTorch for float32
    products is left at ``"highest"``. Under autocast the program raises.

    Args:
        model: ``DNR``, ``NR`` or another classifier with a reject option, fitted, its threshold
            set. It is not changed.
        images: Example batch, ``(n, ...)``; its shape but for n, its dtype and its device become
            the program's. The values go nowhere.

    Returns:
        Program from ``images (n, ...)``, n >= 1, to the outputs of ``Decision``.

    Raises:
        ValueError: If the model has no reject option, or an SVM whose kernel is gpytorch's.
        NotFittedError: If the model is not fitted, or its threshold is not set.
        RuntimeError: If ``torch.export`` cannot follow the network, or the network fixes the
            number of images.
    """
    if getattr(model, "reject_index", None) is None:
        raise ValueError(
            f"model must be a classifier with a reject option, such as DNR or NR, got "
            f"{type(model).__name__}; export a plain network with torch.export itself"
        )
    svms = [module for module in model.modules() if isinstance(module, RBFSVM)]
    if any(svm.is_fitted and rbf_gamma(svm.kernel) is None for svm in svms):
        raise ValueError(
            "only SVMs with the default RBF kernel can be exported, got one with a kernel of "
            "gpytorch; fit with kernel=None"
        )
    example = torch.zeros_like(images[:1]).expand(2, *images.shape[1:]).contiguous()  # 1 is special
    decision = Decision(model)
    with evaluation_mode(model), torch.no_grad():
        decision(example)  # raises what the model has to say, before torch.export does
        shapes = {INPUT: {0: torch.export.Dim("n", min=1)}}
        try:
            return torch.export.export(decision, (example,), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # torch.export raises errors of many private classes
            raise RuntimeError(
                f"torch.export cannot follow the {type(model).__name__} for any number n of "
                "images; its network must keep n free and not branch on values. Cause: "
                f"{type(error).__name__}: {error}"
            ) from error


def export_onnx(
    model: nn.Module,
    path: str | Path,
    images: Tensor,
    *,
    opset: int = 18,
    external_data: bool | None = None,
) -> None:
    """Export a fitted classifier with a reject option to an ONNX file, for any number of images.

    Input ``images (n, ...)``, outputs ``scores (n, c)``, ``labels (n,)`` and ``rejected (n,)`` as
    in ``Decision``; the file's metadata hold ``threshold`` and ``reject_label``. Weights of more
    than 2 GiB go to a second file beside it, named ``path``, eight characters and ``.data``; that
    of an earlier export is removed. On NVIDIA devices switch TF32 off, which onnxruntime has on:
    provider option ``{"use_tf32": 0}``.

    Args:
        model: As in ``export_program``.
        path: File to write, whole or not at all, also where there are two.
        images: Example batch, as in ``export_program``.
        opset: Version of ONNX's operators, >= 18.
        external_data: Whether weights go to the second file; None: if they take more than 2 GiB.

    Raises:
        ImportError: If onnx or onnxscript is not installed.
        ValueError: As in ``export_program``; or if ``opset`` < 18.
        NotFittedError: If the model is not fitted, or its threshold is not set.
        RuntimeError: As in ``export_program``; or if ONNX has no counterpart of an operation.
        OSError: If the file cannot be written; an earlier one then stays as it was.
    """
    if opset < 18:
        raise ValueError(f"opset must be >= 18, got {opset}; PyTorch exports no older one")
    try:
        for name in ("onnx", "onnxscript"):
            import_module(name)
    except ImportError as error:
        raise ImportError(
            f"export_onnx needs onnx and onnxscript ({error}): pip install 'torchdnr[onnx]'"
        ) from error
    program = export_program(model, images)
    exported = torch.onnx.export(  # a program, since dynamo=True
        program,
        dynamo=True,
        opset_version=opset,
        input_names=[INPUT],
        output_names=list(OUTPUTS),
        verbose=False,
    )
    onnx_model = cast(torch.onnx.ONNXProgram, exported).model
    _name_batch_axis(onnx_model)
    onnx_model.metadata_props["reject_label"] = str(REJECT)
    if isinstance(threshold := getattr(model, "threshold", None), Tensor | float):
        onnx_model.metadata_props["threshold"] = repr(float(threshold))
    _save_onnx(onnx_model, Path(path), external_data)


def _name_batch_axis(model: "Model") -> None:
    """Call the number of images n, wherever the exporter made up a name."""
    from onnx_ir import Shape

    graph = model.graph
    made_up = str(graph.inputs[0].shape[0])
    values = [*graph.inputs, *(value for node in graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            sizes = [size if isinstance(size, int) else str(size) for size in value.shape]
            value.shape = Shape([BATCH_AXIS if size == made_up else size for size in sizes])


def _save_onnx(model: "Model", path: Path, external_data: bool | None) -> None:
    from onnx_ir import save

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    # Weights of an earlier export keep their name until no graph names them any more.
    data = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.data")
    try:
        with atomic_path(path) as temporary:
            if not (size > ONNX_FILE_LIMIT if external_data is None else external_data):
                save(model, temporary)
            else:
                save(model, temporary, external_data=data.name)
                with data.open("rb") as written:
                    os.fsync(written.fileno())  # before the graph that names it is there
    except BaseException:
        data.unlink(missing_ok=True)
        raise
    name = re.compile(re.escape(path.name) + r"\.([0-9a-f]{8}\.)?data")
    for other in path.parent.iterdir():
        if other != data and name.fullmatch(other.name):
            other.unlink()
