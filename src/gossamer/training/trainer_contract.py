"""What `RowTrainer` and `SquareHead` rely on in transformers' Trainer, and the check that it is there.

`RowTrainer` overrides methods that transformers does not promise to keep. A version that renames one would
still train: it would call its own method, and ours, which checks the gradient or writes the checkpoint, would
never run. So every method is looked at before training begins, and a version that differs is refused.
"""

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers import Trainer

from gossamer.errors import UnsupportedError

# The tests run with both. Older ones lack the property by which the Trainer knows that a model is sharded.
OLDEST_TESTED, NEWEST_TESTED = "5.19.0", "5.23.0"

SIGNATURES = {
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "_load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
    "_load_optimizer_and_scheduler": "(self, checkpoint)",
    "_save": "(self, output_dir=None, state_dict=None)",
    "_save_checkpoint": "(self, model, trial)",
    "_save_optimizer_and_scheduler": "(self, output_dir)",
    "_save_rng_state": "(self, output_dir)",
    "compute_loss": "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    "create_scheduler": "(self, num_training_steps, optimizer=None)",
    "get_batch_samples": "(self, epoch_iterator, num_batches, device)",
    "get_optimizer_cls_and_kwargs": "(args, model=None)",
    "log": "(self, logs, start_time=None)",
    "training_step": "(self, model, inputs, num_items_in_batch=None)",
}


def check_trainer() -> None:
    """Raise UnsupportedError if the installed Trainer lacks one of `SIGNATURES` or has it otherwise."""
    for name, expected in SIGNATURES.items():
        method = getattr(Trainer, name, None)
        found = "no such method" if method is None else _signature(method)
        if found != expected:
            raise unsupported_version(f"Trainer.{name}: found {found}, expected {expected}")


def unsupported_version(found: str) -> UnsupportedError:
    """The error for an installed transformers that is not what this package was written for."""
    return UnsupportedError(
        f"transformers {transformers.__version__} has another {found}; training is known to work with "
        f"transformers {OLDEST_TESTED} to {NEWEST_TESTED}: pip install 'transformers=={NEWEST_TESTED}'"
    )


def _signature(method: Callable[..., Any]) -> str:
    """Names and defaults of the parameters, without annotations."""
    found = inspect.signature(method)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
