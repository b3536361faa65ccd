"""What pyproject.toml cannot say: the shipped configs travel inside the package moda_jax."""

from setuptools import find_namespace_packages, setup

configs = find_namespace_packages(include=["configs*"])
setup(
    packages=[
        *find_namespace_packages(include=["moda_jax*", "pallas_kernels*"]),
        *(f"moda_jax.{name}" for name in configs),
    ],
    package_dir={"moda_jax.configs": "configs"},
)
