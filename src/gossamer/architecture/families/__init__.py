"""The families of models that are understood: one file each, named by the class without its ending.

A family's file has `SUMMARY`, a line for people that says what of it is supported, and
`anatomy(config) -> Anatomy`, which raises UnsupportedError for what is not. A decoder's class ends in
`ForCausalLM`; an encoder's file says in `ENDINGS` which it has. Only the one that a model needs is loaded.
"""

import importlib
import pkgutil
import re
from collections.abc import Mapping
from typing import Any

from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.config import Config
from gossamer.errors import UnsupportedError

_CLASS = re.compile(r"(.+?)(Model|For\w+)?")


def read_anatomy(config: Mapping[str, Any], source: str = "config.json") -> Anatomy:
    """What the model of a `config.json` is made of.

    UnsupportedError for a family or a setting that is not understood, CheckpointError for a bad number.
    """
    anatomy = _family(config, source).anatomy(Config(config, source))
    _refuse_what_nothing_runs(anatomy, source)
    return anatomy


def _refuse_what_nothing_runs(anatomy: Anatomy, source: str) -> None:
    """UnsupportedError for what an anatomy can say and neither the layer walk nor the engine can do yet."""
    blocks = list({id(block): block for block in anatomy.blocks}.values())  # most layers share one value
    attentions, norms = [block.attention for block in blocks], [block.norms for block in blocks]
    after = ("after_attention", "after_feed_forward")
    heads = {(found.num_heads, found.num_kv_heads, found.head_dim) for found in attentions}
    problems = {
        "capped attention scores": any(found.softcap is not None for found in attentions),
        "several kinds of rope": len({it.rope for it in attentions if it.causal} - {None}) > 1,
        "other heads in some layers": len(heads) > 1,
        "another feed-forward width in some layers": len({block.feed_forward.width for block in blocks}) > 1,
        "experts": any(block.feed_forward.num_experts for block in blocks),
        "norms after a sublayer": any(place in found for found in norms for place in after),
        "norms with an offset": any(norm.offset for found in norms for norm in found.values()),
        "a scaled embedding": anatomy.embedding_scale != 1,
        "capped logits": anatomy.logit_softcap is not None,
    }
    if found := [name for name, is_there in problems.items() if is_there]:
        raise UnsupportedError(f"{source}: a {anatomy.model_type} with {', '.join(found)}; not supported yet")


def _family(config: Mapping[str, Any], source: str) -> Any:
    """`LlamaForCausalLM` is of the file `llama`; only a file that is there is ever imported."""
    found = config.get("architectures") or [config.get("model_type", "no architecture")]
    names = found if isinstance(found, list) else [found]
    families = [module.name for module in pkgutil.iter_modules(__path__)]
    parts = _CLASS.fullmatch(str(names[0]))
    name, ending = parts.groups() if parts else ("", None)
    if len(names) == 1 and (name := name.replace("-", "").lower()) in families:
        family = importlib.import_module(f"{__name__}.{name}")
        endings = getattr(family, "ENDINGS", ("ForCausalLM",))
        if ending in endings or (ending is None and not config.get("architectures")):
            return family
    modules = [importlib.import_module(f"{__name__}.{name}") for name in families]
    known = "; ".join(it.SUMMARY for it in sorted(modules, key=lambda it: hasattr(it, "ENDINGS")))
    raise UnsupportedError(f"{source}: found architecture {', '.join(map(str, names))}; supported: {known}")
