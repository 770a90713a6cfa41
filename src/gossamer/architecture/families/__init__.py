"""The families of models that are understood: one file each, named as transformers names its `model_type`.

A family's file has `SUMMARY`, a line for people that says what of it is supported, and
`anatomy(config) -> Anatomy`, which raises UnsupportedError for what is not. There is no list of families: a
file in this folder is one, and only the one that a model needs is loaded.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.config import Config
from gossamer.errors import UnsupportedError

_SUFFIX = "ForCausalLM"


def read_anatomy(config: Mapping[str, Any], source: str = "config.json") -> Anatomy:
    """What the model of a `config.json` is made of.

    UnsupportedError for a family or a setting that is not understood, CheckpointError for a bad number.
    """
    model_type = _model_type(config, source)
    return importlib.import_module(f"{__name__}.{model_type}").anatomy(Config(config, source))


def _model_type(config: Mapping[str, Any], source: str) -> str:
    """`LlamaForCausalLM` is of the type `llama`; only a file that is there is ever imported."""
    found = config.get("architectures") or [config.get("model_type", "no architecture")]
    names = found if isinstance(found, list) else [found]
    families = [module.name for module in pkgutil.iter_modules(__path__)]
    model_type = str(names[0]).removesuffix(_SUFFIX).lower()
    is_decoder = not config.get("architectures") or str(names[0]).endswith(_SUFFIX)
    if len(names) != 1 or not is_decoder or model_type not in families:
        known = "; ".join(importlib.import_module(f"{__name__}.{name}").SUMMARY for name in families)
        raise UnsupportedError(
            f"{source}: found architecture {', '.join(map(str, names))}; supported: {known}"
        )
    return model_type
