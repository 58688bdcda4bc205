"""Installs `eq`; every value is read from settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = config["DEFAULT"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("dev", "export", "wsi", "ct", "cluster", "track", "wandb", "explain", "embed", "ddp", "anomaly")}
setup(
    name=cfg["lib_name"], version=cfg["version"], license="Apache-2.0", url=cfg["git_url"],
    description=cfg["description"], author=cfg["author"], author_email=cfg["author_email"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=find_packages(include=["eq", "eq.*"]), package_data={"eq": ["py.typed", "params.yaml"]}, python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(), extras_require=extras,
    entry_points={"console_scripts": [cfg["console_scripts"]], "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
)
