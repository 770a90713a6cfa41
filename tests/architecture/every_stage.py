"""One model of a family through every stage and the engine, held against transformers: for a family's tests.

Each function takes a directory of a tiny random model (`llamas.save_random`). A family's own test file calls
them all.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from gossamer.architecture.anatomy import EMBEDDING
from gossamer.checkpoint.directory import Checkpoint
from gossamer.engine import LLM, SamplingParams
from gossamer.layerwise.rounding import smooth
from gossamer.modules.decoder import blocks, embed
from gossamer.packed.from_checkpoint import pack_checkpoint
from gossamer.packed.reader import Packed
from gossamer.stages.finetune import Finetune, finetune
from gossamer.stages.pack import Pack, pack
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize
from gossamer.tools.inspect import Inspect, inspect
from gossamer.tools.verify import Verify, verify
from gossamer.training.whole_model import load_model
from llamas import walk_through

PROMPT = "Once upon a time"


def reference(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def some_ids() -> torch.Tensor:
    return torch.randint(0, 320, (2, 90), generator=torch.Generator().manual_seed(1))


def check_layers(directory: Path) -> None:
    """Walking layer by layer gives transformers' logits, and so do layers called, and training's model."""
    source, model, ids_BT = Checkpoint.open(directory), reference(directory), some_ids()
    hidden_BTD = embed(source, ids_BT)
    for block in blocks(source):
        called_BTD = block(hidden_BTD)
        for _, inputs in block.walk(hidden_BTD):
            assert all(torch.isfinite(piece).all() for piece in inputs)
        torch.testing.assert_close(called_BTD, hidden_BTD)
    with torch.no_grad():
        expected_BTV = model(ids_BT).logits
        torch.testing.assert_close(load_model(source)(ids_BT).logits, expected_BTV)
        found_BTV = model.lm_head(model.model.norm(hidden_BTD))
        torch.testing.assert_close(found_BTV, expected_BTV, rtol=1e-4, atol=1e-4)


def check_smoothing(directory: Path) -> None:
    """Factors that are folded into norms, linears and their biases leave every layer's output as it is."""
    source = Checkpoint.open(directory)
    hidden_BTD = embed(source, some_ids())
    for block in blocks(source):
        before = {name: weight.clone() for name, weight in block.layer.named_parameters()}
        expected_BTD = walk_through(block, hidden_BTD.clone())
        smooth(block, source, hidden_BTD, 0.8, [])
        torch.testing.assert_close(walk_through(block, hidden_BTD), expected_BTD, rtol=1e-4, atol=1e-4)
        for role in ("v", "up"):
            linear = block.anatomy.linears[role]
            for kind in ("weight", "bias") if linear.bias else ("weight",):
                name = f"{linear.name}.{kind}"
                assert not torch.equal(block.layer.get_parameter(name), before[name]), name


def check_engine(directory: Path, path: Path) -> None:
    """The packed model's logits are transformers' to 1e-4 of the largest, and 200 greedy tokens the same."""
    pack_checkpoint(Checkpoint.open(directory), path)
    model, llm = reference(directory), LLM(path, 1, kv_cache_dtype="f32")
    ids = llm.tokenizer.encode(PROMPT)
    with torch.no_grad():
        ids_1T = torch.tensor([ids])
        expected = model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=200,
            do_sample=False,
            pad_token_id=0,
        )
        logits_TV = model(expected).logits[0].numpy()
    error = np.abs(llm.logits(expected[0].tolist()) - logits_TV).max() / np.abs(logits_TV).max()
    assert error < 1e-4
    new = expected[0, len(ids) :].tolist()
    [found] = llm.generate(PROMPT, SamplingParams(max_tokens=200))
    assert found.token_ids == new


def check_stages(directory: Path, text: Path, output: Path) -> Packed:
    """prune, pretrain, finetune, quantize, pack: zeros only grow, and `verify` passes every directory."""
    pruned, trained, tuned, quantized = (output / name for name in ("50", "trained", "tuned", "int8"))
    few: dict[str, Any] = {"dataset": (str(text),), "num_calibration_samples": 8, "max_seq_length": 64}
    steps: dict[str, Any] = {"max_length": 64, "batch_tokens": 256, "learning_rate": 1e-3}
    prune(Prune(str(directory), str(pruned), sparsity=0.5, **few))
    pretrain(
        Pretrain(str(pruned), str(trained), dataset=(str(text),), num_tokens=1024, kernel="sparse", **steps)
    )
    examples = ("python:doctests:40",)
    finetune(
        Finetune(
            str(trained), str(tuned), dataset=examples, teacher=str(directory), num_train_epochs=1, **steps
        )
    )
    quantize(Quantize(str(tuned), str(quantized), **few))
    for parent, child in ((directory, pruned), (pruned, trained), (trained, tuned), (tuned, quantized)):
        verify(Verify(str(child), parent=str(parent)))
        assert abs(Checkpoint.open(child).sparsity() - 0.5) < 0.02
    check_engine(pruned, output / "50.goss")
    pack(Pack(str(quantized), str(output / "model.goss"), storage="smallest"))
    verify(Verify(str(output / "model.goss"), parent=str(quantized)))
    assert (
        inspect(Inspect(str(output / "model.goss"))).architecture["model_type"]
        in str(Checkpoint.open(directory).config["architectures"]).lower()
    )
    check_int8(quantized, output / "model.goss")
    return Packed.open(output / "model.goss")


def check_int8(directory: Path, path: Path) -> None:
    """The INT8 engine is within rounding of transformers' own reading of the quantized directory.

    It also chooses the same tokens wherever that is not a matter of rounding. What transformers looks up are
    the numbers that the file holds, where these are integers.
    """
    ids, model = list(range(2, 90)), reference(directory)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.from_numpy(Packed.open(path).linear(EMBEDDING)))
        expected_TV = model(torch.tensor([ids])).logits[0].numpy()
    found_TV = LLM(path, 1, kv_cache_dtype="f32").logits(ids)
    assert np.linalg.norm(found_TV - expected_TV) < 0.05 * np.linalg.norm(expected_TV)
    second_T, first_T = np.sort(expected_TV, axis=1)[:, -2:].T
    clear_T = first_T - second_T > 0.1 * first_T
    assert clear_T.mean() > 0.1
    assert np.array_equal(found_TV.argmax(1)[clear_T], expected_TV.argmax(1)[clear_T])
