"""Two processes against one: the same losses and weights under DDP and FSDP2, and the traps on the way."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import ConfigError
from gossamer.stages.pretrain import pretrain
from gossamer.training.masks import model_mask_hash
from gossamer.training.parallel import gather_to_first, rows_of_this_process
from gossamer.training.rows import Rows
from two_processes import GRADUAL, job, watched

WORKER = Path(__file__).parents[1] / "two_processes.py"
LIMIT_S = 240


def torchrun(what: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`two_processes.py what folder` in two gloo processes on the CPU."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command, what, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


@pytest.fixture(scope="module")
def folder(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, the same with half of its decoder zero (its embeddings tied), and a text."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "dense").symlink_to(tiny_llama("llama3"))
    model = LlamaForCausalLM.from_pretrained(folder / "dense")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.mul_(torch.rand_like(weight) < 0.5)
    model.save_pretrained(folder / "sparse")
    (folder / "sparse" / "tokenizer.json").symlink_to(folder / "dense" / "tokenizer.json")
    lines = [f"def f{n}(x):\n    return {n} * x + {n % 7}\n" for n in range(200)]
    (folder / "text.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Iterator[dict[str, Any]]:
    """What two processes report, and by the same names prefixed with `one-` what one process does."""
    ran = torchrun("everything", folder)
    assert ran.returncode == 0, ran.stderr[-12000:]
    reports = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]
    alone = {
        "one-f32": watched(job(folder, "one-f32")),
        "one-lora": watched(job(folder, "one-lora", lora=4)),
        "one-bf16": watched(job(folder, "one-bf16", precision="bf16")),
        "one-idle": watched(job(folder, "one-idle", num_tokens=(2 * 8 + 1) * 32)),
    }
    yield reports[0] | alone | {"second": reports[1]}


@pytest.mark.parametrize(
    ("two", "one", "tolerance"),
    [
        ("ddp", "one-f32", 1e-5),
        ("fsdp", "one-f32", 1e-5),
        ("values", "one-f32", 1e-5),
        ("lora", "one-lora", 1e-5),
        ("bf16", "one-bf16", 3e-3),
        ("idle", "one-idle", 1e-5),
    ],
)
def test_two_processes_match_one(
    found: dict[str, Any], folder: Path, two: str, one: str, tolerance: float
) -> None:
    """Same losses, same weights, same zeros on disk: teacher, clipping, decay and accumulation are all on.

    `idle`: the last step has a row for the first process alone.

    Sums over a batch are taken in another order, which float32 sees in the seventh digit and AdamW, dividing
    by the gradient's own size, passes on; in bf16 that digit can round a product differently, by 2 ** -9.
    """
    assert found[one]["num_accumulated"] == 2 * found[two]["num_accumulated"] == 4
    assert len(found[two]["losses"]) == (3 if two == "idle" else 5)
    assert found[two]["losses"] == pytest.approx(found[one]["losses"], rel=tolerance)
    assert found["second"][two]["losses"] == found[two]["losses"]
    ours, theirs, parent = (Checkpoint.open(folder / name) for name in (two, one, "sparse"))
    for name in parent.names:
        np.testing.assert_allclose(
            ours.float32(name), theirs.float32(name), atol=10 * tolerance, err_msg=name
        )
    assert not any((parent.zeros(f"{n}.weight") & ~ours.zeros(f"{n}.weight")).any() for n in parent.linears)
    assert found[two]["sparsity"] == found[one]["sparsity"] > 0.49


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_prune_as_one_does(found: dict[str, Any], folder: Path, parallel: str) -> None:
    """Of weights that are nearly as small as each other, one may go for another where sums are rounded."""
    one = folder / "gradual-one"
    if not one.exists():
        pretrain(job(folder, "gradual-one", prune_schedule=GRADUAL))
    ours, theirs, parent = (Checkpoint.open(folder / name) for name in (f"gradual-{parallel}", one, "sparse"))
    for name in (f"{linear}.weight" for linear in parent.linears):
        zeros_NK = ours.zeros(name)
        assert zeros_NK.sum() == theirs.zeros(name).sum() == round(0.7 * zeros_NK.size)
        assert (zeros_NK != theirs.zeros(name)).sum() <= 2
        assert not (parent.zeros(name) & ~zeros_NK).any()
        both_NK = ~zeros_NK & ~theirs.zeros(name)
        np.testing.assert_allclose(ours.float32(name)[both_NK], theirs.float32(name)[both_NK], atol=1e-4)


def test_fsdp_shards_every_parameter_and_ddp_none(found: dict[str, Any]) -> None:
    assert found["fsdp"]["num_sharded"] == found["fsdp"]["num_parameters"] == 20
    assert found["bf16"]["num_sharded"] == 20
    assert found["ddp"]["num_sharded"] == found["one-f32"]["num_sharded"] == 0


def test_mask_hash_is_the_same_sharded_or_whole(found: dict[str, Any], folder: Path) -> None:
    expected = model_mask_hash(Checkpoint.open(folder / "sparse"))
    runs = [found[name] for name in ("one-f32", "ddp", "fsdp")] + [found["second"]["fsdp"]]
    runs.append(found["values"])
    assert [run["mask_hashes"] for run in runs] == [[expected, expected]] * 5


def test_the_first_process_alone_reports(found: dict[str, Any]) -> None:
    assert found["ddp"]["num_events"] == found["one-f32"]["num_events"] > 5
    assert found["second"]["ddp"]["num_events"] == found["second"]["fsdp"]["num_events"] == 0


def test_the_trainer_on_cpu_ranks_turns_fsdp_into_ddp(found: dict[str, Any]) -> None:
    """Why `parallel.py` shards by itself; should this fail, accelerate has learned it, and that can go."""
    assert found["trap_of_use_cpu"] == ["DistributedDataParallel", "Tensor"]


def test_hooks_from_before_sharding_never_run_and_the_step_check_says_so(found: dict[str, Any]) -> None:
    trap = found["trap_of_early_hooks"]
    assert (trap["before"], trap["after"]) == (0, 1)
    assert "was never masked (so for 14 of 14 sparse weights)" in trap["error"]


def test_an_optimizer_that_writes_everywhere_is_caught_under_fsdp(found: dict[str, Any]) -> None:
    assert "step 1:" in found["adversary"] and "pruned weights of model.layers" in found["adversary"]


def test_one_process_that_fails_ends_all(folder: Path) -> None:
    """Ends before `LIMIT_S`: the first process would wait for the second for a day."""
    ran = torchrun("failure_of_one", folder)
    assert ran.returncode != 0
    assert "the second process gave up" in ran.stderr
    assert not (folder / "failed").exists()


def test_what_is_gathered_stays_with_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"a": torch.ones(2), "b": 3}
    assert gather_to_first(named) == named
    monkeypatch.setenv("RANK", "1")
    assert gather_to_first(named) == {}


def test_rows_that_cannot_be_shared_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert rows_of_this_process(6, 32) == 2
    with pytest.raises(
        ConfigError, match=r"makes 8 rows of 32 tokens, which 3 processes .* multiple of 96 tokens"
    ):
        rows_of_this_process(8, 32)


def test_fsdp_in_one_process_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--parallel fsdp found one process; start several with torchrun"):
        pretrain(job(folder, "refused", parallel="fsdp"))
    assert not (folder / "refused").exists()


def test_padding_rows_have_neither_loss_nor_tokens() -> None:
    rows = Rows(np.arange(2, 14, dtype=np.int32).reshape(3, 4)).padded(4)
    batch = rows.collate([2, 3])
    assert len(rows) == 4 and len(rows.padded(2)) == 4
    assert batch["labels"].tolist() == [[-100, 11, 12, 13], [-100] * 4]
    assert batch["token_mask"].tolist() == [[True] * 4, [False] * 4]
    assert rows.collate([3])["labels"].shape == (1, 1)
