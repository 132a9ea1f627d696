"""How deep the calls go from what a user calls to the mathematics: `python tests/call_depth.py`."""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import numpy as np
import torch
from small_models import LAYERS, make_images, options, small_network

from torchdnr import DNR
from torchdnr.attacks.pgd import descend_steadily
from torchdnr.cli import train
from torchdnr.svm.newton import newton_blocks

ROOT = Path(__file__).parents[1]
PRODUCTS = {"addmm", "baddbmm", "matmul", "mm", "linear"}

Stack = list[tuple[str, str]]


def calls_down_to(run: Callable[[], object], innermost: Callable[[FrameType, str], bool]) -> Stack:
    """Run something and return the deepest stack in which a call is what is looked for.

    Args:
        run: What a user does.
        innermost: Maps a frame, and the name of a function written in C that it calls or "", to
            whether this is the call.

    Returns:
        (file, function) from the outside in, of the functions of this repository alone.
    """
    stacks: list[Stack] = []

    def profile(frame: FrameType, event: str, called: object) -> None:
        if event == "call":
            name = ""
        elif event == "c_call":
            name = getattr(called, "__name__", "?")
        else:
            return
        if innermost(frame, name):
            stacks.append(_functions(frame))

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return max(stacks, key=len, default=[])


def _functions(frame: FrameType | None) -> Stack:
    stack = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "torchdnr") or path == ROOT / "attack.py":
            stack.append((str(path.relative_to(ROOT)), frame.f_code.co_name))
        frame = frame.f_back
    return stack[::-1]


def _runs(code: CodeType) -> Callable[[FrameType, str], bool]:
    return lambda frame, name: name == "" and frame.f_code is code


def forward_pass() -> Stack:
    """From ``DNR(x)`` to the matrix product of the kernel."""
    images = make_images(60)
    model = DNR(small_network(), LAYERS, **options(*LAYERS, "combiner"))
    model.fit(images, torch.arange(60) % 3).calibrate(images, 0.2)

    def product(frame: FrameType, name: str) -> bool:
        return name in PRODUCTS and "/kernels/" in frame.f_code.co_filename

    return calls_down_to(lambda: model(images[:3]), product)


def fit() -> Stack:
    """From ``DNR.fit`` to a Newton step of the dual solver, a grid search on the way."""
    images = make_images(60)
    model = DNR(small_network(), LAYERS, C_grid=(1.0, 10.0), gamma_grid=(1.0,), folds=2)
    return calls_down_to(
        lambda: model.fit(images, torch.arange(60) % 3), _runs(newton_blocks.__code__)
    )


def attack() -> Stack:
    """From attack.py to the steps of PGD."""
    spec = importlib.util.spec_from_file_location("attack", ROOT / "attack.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    images = make_images(90, size=28)[:, 0].mul(255).byte().numpy()
    labels = np.arange(90) % 3
    with tempfile.TemporaryDirectory() as folder:
        data = {"x_train": images, "y_train": labels, "x_test": images[:9], "y_test": labels[:9]}
        np.savez(f"{folder}/images.npz", **data)
        making = "--network-samples 30 --svm-samples 30 --threshold-samples 30 --layers logits"
        making += " --C-grid 1 --gamma-grid 1 --epochs 1 --device cpu --quiet"
        making += f" --dataset npz:{folder}/images.npz --run {folder}/run"
        train.main(making.split())  # what is made already is not watched, which takes long
        attacking = "--attack pgd --steps 2 --eps 1 --samples 3 --examples 0 --no-checks"
        argv = [*making.split(), *attacking.split()]
        return calls_down_to(lambda: script.main(argv), _runs(descend_steadily.__code__))


if __name__ == "__main__":
    for path in (forward_pass, fit, attack):
        calls = path()
        print(f"{path.__doc__} {len(calls)} calls, {len({file for file, _ in calls})} files")
        print("".join(f"    {file}: {function}\n" for file, function in calls))
