"""What each process does that `test_parallel.py` starts: `torchrun two_processes.py WHAT FOLDER`."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from gossamer.errors import GossamerError, Interrupted
from gossamer.job.processes import is_first
from gossamer.job.report import Event
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.training import trainer as training
from gossamer.training.masks import MaskCallback, model_mask_hash
from gossamer.training.parallel import distribute

GRADUAL = "cubic:0.7:0.2-0.8:1"  # after each of five steps but the last


def job(folder: Path, name: str, **changes: Any) -> Pretrain:
    """Five steps of 8 rows, the last one of 3; with a teacher, clipped gradients and weight decay."""
    options: dict[str, Any] = {
        "dataset": (str(folder / "text.txt"),),
        "teacher": str(folder / "dense"),
        "max_length": 32,
        "batch_tokens": 8 * 32,
        "num_tokens": (4 * 8 + 3) * 32,
        "learning_rate": 3e-3,
        "max_grad_norm": 0.5,
        "precision": "f32",
        "kernel": "dense",
    }
    return Pretrain(model=str(folder / "sparse"), output_dir=str(folder / name), **(options | changes))


class Watch(MaskCallback):
    """Notes what the run's parameters are and what its masks hash to."""

    seen: dict[str, Any]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        model: nn.Module = kwargs["model"]
        Watch.seen = {
            "num_sharded": sum(isinstance(p, DTensor) for p in model.parameters()),
            "num_parameters": len(list(model.parameters())),
            "mask_hashes": [self.enforced_mask_hash(), model_mask_hash(model)],
            "num_accumulated": args.gradient_accumulation_steps,
        }


def watched(run: Pretrain) -> dict[str, Any]:
    """The run's result, and what `Watch` saw; two rows in a micro-batch, so that all of them accumulate."""
    events: list[Any] = []
    with patch.dict(training.MICRO_BATCH_TOKENS, cpu=64), patch.object(training, "MaskCallback", Watch):
        result = pretrain(run, events.append)
    return dataclasses.asdict(result) | Watch.seen | {"num_events": len(events)}


def as_torchrun(rank: int, port: int, count: int) -> None:
    """Make of this process what torchrun would."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def one_of_two(rank: int, port: int, run: Pretrain) -> None:
    as_torchrun(rank, port, 2)
    pretrain(run)


def one_of_three(rank: int, port: int, whole: Pretrain, stopped: Pretrain) -> None:
    """One run undisturbed, another stopped by Ctrl-C in its fifth step and gone on with."""

    def press_control_c(event: Event) -> None:
        if event.done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    as_torchrun(rank, port, 3)
    dist.init_process_group("gloo")
    pretrain(whole)
    with contextlib.suppress(Interrupted):
        pretrain(stopped, press_control_c)
    pretrain(dataclasses.replace(stopped, resume=True))
    dist.destroy_process_group()


class RandomRows(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_T = torch.randint(2, 320, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids_T, "labels": ids_T}


def trainer(folder: Path, model: LlamaForCausalLM, *callbacks: TrainerCallback, **changes: Any) -> Trainer:
    """transformers' own, as a user would make it."""
    settings: dict[str, Any] = {
        "output_dir": str(folder / "scratch"),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Trainer(
        model,
        TrainingArguments(**(settings | changes)),
        train_dataset=RandomRows(),
        callbacks=list(callbacks),
    )


def trap_of_use_cpu(folder: Path) -> list[str]:
    """A Trainer that is asked for FSDP2 on CPU ranks: the class it trains with, and that of a parameter."""
    model = LlamaForCausalLM.from_pretrained(folder / "sparse")
    asked = trainer(folder, model, MaskCallback(), fsdp="full_shard", fsdp_config={"version": 2})
    asked.train()
    wrapped = asked.model_wrapped
    assert isinstance(wrapped, nn.Module)
    return [type(wrapped).__name__, type(next(wrapped.parameters()).data).__name__]


def trap_of_early_hooks(folder: Path) -> dict[str, Any]:
    """How often hooks run from before and after sharding, and what the step check says of the former."""
    model = LlamaForCausalLM.from_pretrained(folder / "sparse")
    masks, fired = MaskCallback(), {"before": 0, "after": 0}
    state = type("State", (), {"global_step": 0})()
    masks.on_train_begin(None, state, None, model=model)

    def count(when: str) -> None:
        def hook(_: Tensor) -> None:
            fired[when] += 1

        model.get_parameter("model.layers.0.mlp.up_proj.weight").register_post_accumulate_grad_hook(hook)

    count("before")
    distribute(model, "fsdp")
    count("after")
    ids_BT = torch.arange(2, 26).view(2, 12)
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    try:
        masks.on_optimizer_step(None, state, None)
    except GossamerError as error:
        return fired | {"error": str(error)}
    return fired


class WritesEverywhere(torch.optim.AdamW):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for weight in self.state:
            weight.add_(1e-3)
        return loss


def adversary(folder: Path) -> str:
    """What the first step says of an optimizer that writes everywhere, under FSDP2."""
    model = LlamaForCausalLM.from_pretrained(folder / "sparse")
    distribute(model, "fsdp")
    optimizer = WritesEverywhere(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    attacked = trainer(folder, model, MaskCallback())
    attacked.optimizer, attacked.lr_scheduler = optimizer, schedule
    try:
        attacked.train()
    except GossamerError as error:
        return str(error)
    return "nothing"


def everything(folder: Path) -> None:
    dist.init_process_group("gloo")
    found = {
        name: watched(job(folder, name, **changes))
        for name, changes in {
            "ddp": {},
            "fsdp": {"parallel": "fsdp"},
            "bf16": {"parallel": "fsdp", "precision": "bf16"},
            "values": {"kernel": "sparse"},
            "lora": {"lora": 4},
            "idle": {"num_tokens": (2 * 8 + 1) * 32},
        }.items()
    }
    for parallel in ("ddp", "fsdp"):
        pretrain(job(folder, f"gradual-{parallel}", parallel=parallel, prune_schedule=GRADUAL))
    found |= {
        "trap_of_use_cpu": trap_of_use_cpu(folder),
        "trap_of_early_hooks": trap_of_early_hooks(folder),
        "adversary": adversary(folder),
    }
    (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def failure_of_one(folder: Path) -> None:
    """The second process gives up in the second step, while the first one waits for its gradients."""

    class GivesUp(MaskCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1 and not is_first():
                raise RuntimeError("the second process gave up")

    with patch.object(training, "MaskCallback", GivesUp):
        pretrain(job(folder, "failed"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"everything": everything, "failure_of_one": failure_of_one}[sys.argv[1]](Path(sys.argv[2]))
