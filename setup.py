from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="fairseq-sffn",
    version="0.1.0",
    description="Language models with sparse feed-forward networks, as a fairseq plugin",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    packages=find_packages(include=["fairseq_sffn", "fairseq_sffn.*"]),
    package_data={
        "fairseq_sffn.memory": ["README.md"],
        "fairseq_sffn.memory.compute": ["kernels.cpp"],
    },
    python_requires=">=3.11,<3.13",
    install_requires=[
        "ve-fairseq>=0.12.3",
        # Comes with ve-fairseq, for speech alone. Newer ones would bring a PyTorch of their own.
        "torchaudio<=2.11.0",
        "fairscale>=0.4.13",
        "sentencepiece",
    ],
    extras_require={
        # The range that tests/versions.sh was run with. It is no requirement: pip would replace a
        # PyTorch outside of it. Where there is none, fairseq requires one.
        "torch": ["torch>=2.9,<2.16"],
        # For `fairseq-sffn export`, which needs the first alone, and to load what it writes.
        "export": ["safetensors", "transformers"],
        "experiments": ["matplotlib", "pandas", "pydantic>=2", "scipy", "tqdm"],
        "plots": ["matplotlib"],
        # For examples/zero_shot/lm_eval_adapter.py, and lm_eval itself on exported folders, in an
        # environment of its own.
        "eval": ["lm-eval[hf]>=0.4.13,<0.5"],
        "tests": ["pytest", "pytest-xdist", "ruff", "mypy", "tensorboardX"],
    },
    entry_points={"console_scripts": ["fairseq-sffn = fairseq_sffn.tools.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
)
